/* The way of one `acquire` or `release` from the caller to _staged.h, with all that has to be asked on it: whether the
   calling thread is in the middle of this runtime's pass, which device is current, which stream is, and whether that is
   being captured into a graph. Where an answer is not the usual one, nothing is changed, and Python goes on. */

#pragma once

#include "_issue.h"

#pragma GCC visibility push(hidden)

int add_hit_path_types(PyObject *module);

#pragma GCC visibility pop

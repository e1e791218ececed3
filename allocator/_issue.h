/* What else in this extension needs to know of _issue.c's types. */

#pragma once

#include "_python.h"

#pragma GCC visibility push(hidden)

/* Make the types Issuer and Job, and put them into the module. Returns -1 with an exception. */
int add_issue_types(PyObject *module);

/* Whether this is a Job. */
int is_job(PyObject *object);

/* Of a Job: whether `hand_over` can do nothing else but append it. */
int can_be_handed_over(PyObject *job);

/* Append it to what its issuer is to do. It stays alive until it is over. */
void hand_over(PyObject *job);

/* Whether the driver was given everything. */
int is_given(PyObject *job);

/* Wait until the driver was given everything, or refused it, without the interpreter's lock. */
void await_given(PyObject *job);

#pragma GCC visibility pop

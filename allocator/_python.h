/* Python as all files of this extension use it, and what they all do with it. */

#pragma once

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>

/* Free the memory of an object of a type that was made from a specification. */
static inline void free_object(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

/* Raise the exception that `failure` makes of the name of a call and its result. */
static inline void raise_failure(PyObject *failure, const char *call, int result) {
    PyObject *error = PyObject_CallFunction(failure, "si", call, result);
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
}

/* The extension: what must not wait for the interpreter, and what it must not wait for. One file for each thing. */

#include "_hit_path.h"
#include "_issue.h"
#include "_staged.h"

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "A thread that gives copies to the CUDA driver, and what launches pass by.", -1, NULL,
};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *made = PyModule_Create(&module);
    if (made && (add_issue_types(made) || add_staged_types(made) || add_hit_path_types(made)))
        Py_CLEAR(made);
    return made;
}

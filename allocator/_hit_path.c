/* See _hit_path.h. */

#include "_hit_path.h"

#include <structmember.h>

#include "_staged.h"

/* cuCtxGetCurrent and cuStreamIsCapturing; 0 is success */
typedef int (*GetCurrent)(void **context);
typedef int (*IsCapturing)(void *stream, int *status);

typedef struct { /* whose pass it is: see `Lifecycle` */
    PyObject_HEAD
    unsigned long long runner;
    char in_pass;
} TurnObject;

typedef struct {
    PyObject_HEAD
    TurnObject *turn;
    PyObject *layers; /* by number; NULL while nothing is hit */
    PyObject *driver, *current_stream;
    long index;
    GetCurrent get_current; /* NULL: ask the driver in Python */
    IsCapturing is_capturing;
    void *context;
} HitPathObject;

static PyTypeObject *turn_type, *path_type;

/* -- which thread, device and stream --------------------------------------------------------------------------------- */

/* A number that no other thread of this process has or had. */
static unsigned long long this_thread(void) {
    static unsigned long long given; /* under the interpreter's lock */
    static _Thread_local unsigned long long mine;
    if (!mine)
        mine = ++given;
    return mine;
}

static PyObject *ask_this_thread(PyObject *module, PyObject *unused) {
    return PyLong_FromUnsignedLongLong(this_thread());
}

static int is_current(const HitPathObject *path) {
    if (path->get_current) {
        void *context = NULL;
        return path->get_current(&context) == 0 && context == path->context;
    }
    PyObject *index = PyObject_CallMethod(path->driver, "current_device", NULL);
    if (!index)
        return -1;
    const long current = PyLong_AsLong(index);
    Py_DECREF(index);
    return PyErr_Occurred() ? -1 : current == path->index;
}

static int find_stream(const HitPathObject *path, void **stream) {
    PyObject *number = PyObject_CallNoArgs(path->current_stream);
    if (!number)
        return -1;
    *stream = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    return PyErr_Occurred() ? -1 : 1;
}

/* Whether `stream` runs what it is given. */
static int runs(const HitPathObject *path, void *stream) {
    if (path->is_capturing) {
        int status = 0;
        return path->is_capturing(stream, &status) == 0 && status == 0;
    }
    PyObject *capturing = PyObject_CallMethod(path->driver, "capturing", NULL);
    if (!capturing)
        return -1;
    const int is_true = PyObject_IsTrue(capturing);
    Py_DECREF(capturing);
    return is_true < 0 ? -1 : !is_true;
}

/* 1 with the stream if the calling thread goes on with its pass, on a stream that runs; 0 if not; -1 with an exception. */
static int goes_on(const HitPathObject *path, void **stream) {
    if (!path->turn->in_pass || path->turn->runner != this_thread())
        return 0;
    int answer = is_current(path);
    if (answer > 0)
        answer = find_stream(path, stream);
    return answer > 0 ? runs(path, *stream) : answer;
}

/* -- acquire and release ------------------------------------------------------------------------------------------- */

static LayerObject *layer_of(const HitPathObject *path, PyObject *number) {
    PyObject *layer = path->layers ? PyDict_GetItemWithError(path->layers, number) : NULL;
    if (!layer)
        PyErr_Clear(); /* what cannot be hashed is no layer, of which Python tells */
    return layer && is_layer(layer) ? (LayerObject *)Py_NewRef(layer) : NULL;
}

static PyObject *path_acquire(PyObject *object, PyObject *number) {
    const HitPathObject *path = (HitPathObject *)object;
    LayerObject *layer = layer_of(path, number);
    if (!layer)
        return Py_NewRef(Py_None);
    PyObject *weights = Py_XNewRef(layer->weights);
    void *stream;
    int acquired = weights ? goes_on(path, &stream) : 0;
    if (acquired > 0)
        acquired = enter(layer, stream);
    Py_DECREF(layer);
    if (acquired > 0)
        return weights;
    Py_XDECREF(weights);
    return acquired ? NULL : Py_NewRef(Py_None);
}

static PyObject *path_release(PyObject *object, PyObject *number) {
    const HitPathObject *path = (HitPathObject *)object;
    LayerObject *layer = layer_of(path, number);
    if (!layer)
        return Py_NewRef(Py_False);
    void *stream;
    int released = goes_on(path, &stream);
    if (released > 0)
        released = leave(layer, stream);
    if (released > 0 && layer->is_last)
        path->turn->in_pass = 0;
    Py_DECREF(layer);
    return released < 0 ? NULL : PyBool_FromLong(released);
}

/* -- Turn ---------------------------------------------------------------------------------------------------------- */

static void free_object(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMemberDef turn_members[] = {
    {"runner", T_ULONGLONG, offsetof(TurnObject, runner), 0, NULL},
    {"in_pass", T_BOOL, offsetof(TurnObject, in_pass), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};
static PyType_Slot turn_slots[] = {
    {Py_tp_members, turn_members},
    {Py_tp_dealloc, free_object},
    {0, NULL},
};
static PyType_Spec turn_spec = {"vmm_dwdp.allocator._native.Turn", sizeof(TurnObject), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, turn_slots};

/* -- HitPath ------------------------------------------------------------------------------------------------------- */

static int path_traverse(PyObject *object, visitproc visit, void *arg) {
    HitPathObject *self = (HitPathObject *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->turn);
    Py_VISIT(self->layers);
    Py_VISIT(self->driver);
    Py_VISIT(self->current_stream);
    return 0;
}

static int path_clear(PyObject *object) {
    HitPathObject *self = (HitPathObject *)object;
    Py_CLEAR(self->layers);
    Py_CLEAR(self->turn);
    Py_CLEAR(self->driver);
    Py_CLEAR(self->current_stream);
    return 0;
}

static void path_dealloc(PyObject *object) {
    PyObject_GC_UnTrack(object);
    path_clear(object);
    free_object(object);
}

static int path_init(PyObject *object, PyObject *arguments, PyObject *keywords) {
    HitPathObject *self = (HitPathObject *)object;
    PyObject *turn, *driver, *calls, *failure;
    unsigned long long get_current = 0, context = 0, is_capturing = 0, wait, record;
    if (!PyArg_ParseTuple(arguments, "O!OO", turn_type, &turn, &driver, &calls))
        return -1;
    if (calls != Py_None && !PyArg_ParseTuple(calls, "KKKKKO", &get_current, &context, &is_capturing, &wait, &record,
                                               &failure))
        return -1;
    PyObject *index = PyObject_GetAttrString(driver, "index");
    if (!index)
        return -1;
    self->index = PyLong_AsLong(index);
    Py_DECREF(index);
    PyObject *current_stream = PyErr_Occurred() ? NULL : PyObject_GetAttrString(driver, "current_stream");
    if (!current_stream)
        return -1;
    path_clear(object);
    self->current_stream = current_stream;
    self->turn = (TurnObject *)Py_NewRef(turn);
    self->driver = Py_NewRef(driver);
    self->get_current = (GetCurrent)get_current;
    self->context = (void *)context;
    self->is_capturing = (IsCapturing)is_capturing;
    return 0;
}

static PyObject *path_open(PyObject *object, PyObject *layers) {
    HitPathObject *self = (HitPathObject *)object;
    if (!PyDict_Check(layers) || !self->turn)
        return PyErr_SetString(PyExc_TypeError, "layers by number"), NULL;
    PyObject *before = self->layers;
    self->layers = Py_NewRef(layers);
    Py_XDECREF(before);
    return Py_NewRef(Py_None);
}

static PyObject *path_close(PyObject *object, PyObject *unused) {
    Py_CLEAR(((HitPathObject *)object)->layers);
    return Py_NewRef(Py_None);
}

static PyMethodDef path_methods[] = {
    {"acquire", path_acquire, METH_O, "The weights of a layer that is hit, which is acquired then; otherwise None."},
    {"release", path_release, METH_O, "Release a layer, if nothing is unusual: whether it was."},
    {"open", path_open, METH_O, "From now on these layers may be hit."},
    {"close", path_close, METH_NOARGS, "No layer is, any more."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot path_slots[] = {
    {Py_tp_init, path_init},
    {Py_tp_methods, path_methods},
    {Py_tp_traverse, path_traverse},
    {Py_tp_clear, path_clear},
    {Py_tp_dealloc, path_dealloc},
    {0, NULL},
};
static PyType_Spec path_spec = {"vmm_dwdp.allocator._native.HitPath", sizeof(HitPathObject), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, path_slots};

static PyMethodDef functions[] = {
    {"this_thread", ask_this_thread, METH_NOARGS, "A number that no other thread of this process has or had."},
    {NULL, NULL, 0, NULL},
};

int add_hit_path_types(PyObject *module) {
    turn_type = (PyTypeObject *)PyType_FromSpec(&turn_spec);
    path_type = (PyTypeObject *)PyType_FromSpec(&path_spec);
    if (!turn_type || !path_type || PyModule_AddObjectRef(module, "Turn", (PyObject *)turn_type) ||
        PyModule_AddObjectRef(module, "HitPath", (PyObject *)path_type))
        return -1;
    return PyModule_AddFunctions(module, functions);
}

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
    PyObject **layers; /* by number, some NULL */
    Py_ssize_t num_layers; /* 0 while nothing is hit */
    PyObject *driver, *index, *current_stream;
    GetCurrent get_current; /* NULL: ask the driver in Python */
    IsCapturing is_capturing;
    void *context;
    PyObject *runtime;           /* a weak reference */
    PyObject *acquire, *release; /* the functions of its class, which do whatever has to be done */
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
    const int is_equal = index ? PyObject_RichCompareBool(index, path->index, Py_EQ) : -1;
    Py_XDECREF(index);
    return is_equal;
}

static int find_stream(const HitPathObject *path, void **stream) {
    PyObject *number = path->get_current ? PyObject_CallFunctionObjArgs(path->current_stream, path->index, NULL)
                                         : PyObject_CallMethod(path->driver, "current_stream", NULL);
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
    const Py_ssize_t at = PyLong_AsSsize_t(number);
    if (at == -1)
        PyErr_Clear(); /* what is no number is no layer, of which Python tells */
    PyObject *layer = at >= 0 && at < path->num_layers ? path->layers[at] : NULL;
    return (LayerObject *)Py_XNewRef(layer);
}

/* Whether a hit cares for none of the named arguments: how many tokens a pass has is asked at its first layer alone. */
static int are_usual(PyObject *names, PyObject *const *values) {
    const Py_ssize_t count = names ? PyTuple_Size(names) : 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        if (values[i] != Py_None && PyUnicode_CompareWithASCIIString(name, "tokens") &&
            PyUnicode_CompareWithASCIIString(name, "top_k"))
            return 0;
    }
    return 1;
}

/* What `function` makes of the arguments. */
static PyObject *go_on(const HitPathObject *path, PyObject *function, PyObject *const *given, Py_ssize_t count,
                       PyObject *names) {
    PyObject *runtime = path->runtime ? PyWeakref_GetObject(path->runtime) : Py_None;
    if (runtime == Py_None)
        return PyErr_SetString(PyExc_RuntimeError, "the runtime is gone"), NULL;
    const Py_ssize_t num_names = names ? PyTuple_Size(names) : 0;
    PyObject *arguments = PyTuple_New(count + 1), *named = num_names ? PyDict_New() : NULL, *result = NULL;
    if (arguments && (named || !num_names)) {
        PyTuple_SetItem(arguments, 0, Py_NewRef(runtime));
        for (Py_ssize_t i = 0; i < count; i++)
            PyTuple_SetItem(arguments, i + 1, Py_NewRef(given[i]));
        int failed = 0;
        for (Py_ssize_t i = 0; i < num_names && !failed; i++)
            failed = PyDict_SetItem(named, PyTuple_GetItem(names, i), given[count + i]);
        if (!failed)
            result = PyObject_Call(function, arguments, named);
    }
    Py_XDECREF(arguments);
    Py_XDECREF(named);
    return result;
}

static PyObject *path_acquire(PyObject *object, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    const HitPathObject *path = (HitPathObject *)object;
    LayerObject *layer = count == 1 && are_usual(names, given + 1) ? layer_of(path, given[0]) : NULL;
    if (layer) {
        PyObject *weights = Py_XNewRef(layer->weights);
        void *stream;
        int acquired = weights ? goes_on(path, &stream) : 0;
        if (acquired > 0)
            acquired = enter(layer, stream);
        Py_DECREF(layer);
        if (acquired > 0)
            return weights;
        Py_XDECREF(weights);
        if (acquired < 0)
            return NULL;
    }
    return go_on(path, path->acquire, given, count, names);
}

static PyObject *path_release(PyObject *object, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    const HitPathObject *path = (HitPathObject *)object;
    LayerObject *layer = count == 1 && are_usual(names, given + 1) ? layer_of(path, given[0]) : NULL;
    if (layer) {
        void *stream;
        int released = goes_on(path, &stream);
        if (released > 0)
            released = leave(layer, stream);
        if (released > 0 && layer->is_last)
            path->turn->in_pass = 0;
        Py_DECREF(layer);
        if (released)
            return released < 0 ? NULL : Py_NewRef(Py_None);
    }
    return go_on(path, path->release, given, count, names);
}

/* -- Turn ---------------------------------------------------------------------------------------------------------- */

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
    for (Py_ssize_t i = 0; i < self->num_layers; i++)
        Py_VISIT(self->layers[i]);
    Py_VISIT(self->driver);
    Py_VISIT(self->index);
    Py_VISIT(self->current_stream);
    Py_VISIT(self->runtime);
    Py_VISIT(self->acquire);
    Py_VISIT(self->release);
    return 0;
}

static void drop_layers(HitPathObject *self) {
    PyObject **layers = self->layers;
    const Py_ssize_t count = self->num_layers;
    self->layers = NULL;
    self->num_layers = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        Py_XDECREF(layers[i]);
    PyMem_Free(layers);
}

static int path_clear(PyObject *object) {
    HitPathObject *self = (HitPathObject *)object;
    drop_layers(self);
    Py_CLEAR(self->turn);
    Py_CLEAR(self->driver);
    Py_CLEAR(self->index);
    Py_CLEAR(self->current_stream);
    Py_CLEAR(self->runtime);
    Py_CLEAR(self->acquire);
    Py_CLEAR(self->release);
    return 0;
}

static void path_dealloc(PyObject *object) {
    PyObject_GC_UnTrack(object);
    path_clear(object);
    free_object(object);
}

static int path_init(PyObject *object, PyObject *arguments, PyObject *keywords) {
    HitPathObject *self = (HitPathObject *)object;
    PyObject *turn, *driver, *calls, *runtime, *acquire, *release, *current_stream = Py_None, *failure;
    unsigned long long get_current = 0, context = 0, is_capturing = 0, wait, record;
    if (!PyArg_ParseTuple(arguments, "O!OOOOO", turn_type, &turn, &driver, &calls, &runtime, &acquire, &release))
        return -1;
    if (calls != Py_None && !PyArg_ParseTuple(calls, "KKKKKOO", &get_current, &context, &is_capturing, &wait, &record,
                                              &current_stream, &failure))
        return -1;
    PyObject *index = PyObject_GetAttrString(driver, "index");
    PyObject *weak = index ? PyWeakref_NewRef(runtime, NULL) : NULL;
    if (!weak) {
        Py_XDECREF(index);
        return -1;
    }
    path_clear(object);
    self->index = index;
    self->runtime = weak;
    self->turn = (TurnObject *)Py_NewRef(turn);
    self->driver = Py_NewRef(driver);
    self->current_stream = Py_NewRef(current_stream);
    self->acquire = Py_NewRef(acquire);
    self->release = Py_NewRef(release);
    self->get_current = (GetCurrent)get_current;
    self->context = (void *)context;
    self->is_capturing = (IsCapturing)is_capturing;
    return 0;
}

#define MAX_NUMBER 65536 /* of a layer that can be hit */

static int read_layer(HitPathObject *self, PyObject *number, PyObject *layer) {
    const Py_ssize_t at = PyLong_AsSsize_t(number);
    if (at == -1 && PyErr_Occurred())
        return -1;
    if (at < 0 || at >= MAX_NUMBER)
        return 0;
    if (!is_layer(layer))
        return PyErr_SetString(PyExc_TypeError, "not a layer"), -1;
    if (at >= self->num_layers) {
        PyObject **more = PyMem_Realloc(self->layers, (at + 1) * sizeof *more);
        if (!more)
            return PyErr_NoMemory(), -1;
        for (Py_ssize_t i = self->num_layers; i <= at; i++)
            more[i] = NULL;
        self->layers = more;
        self->num_layers = at + 1;
    }
    Py_XDECREF(self->layers[at]);
    self->layers[at] = Py_NewRef(layer);
    return 0;
}

static PyObject *path_open(PyObject *object, PyObject *layers) {
    HitPathObject *self = (HitPathObject *)object;
    if (!PyDict_Check(layers) || !self->turn)
        return PyErr_SetString(PyExc_TypeError, "layers by number"), NULL;
    drop_layers(self);
    PyObject *number, *layer;
    for (Py_ssize_t at = 0; PyDict_Next(layers, &at, &number, &layer);)
        if (read_layer(self, number, layer))
            return drop_layers(self), NULL;
    PyObject *acquire = PyObject_GetAttrString(object, "acquire"), *release = PyObject_GetAttrString(object, "release");
    PyObject *made = acquire && release ? Py_BuildValue("{sOsO}", "acquire", acquire, "release", release) : NULL;
    Py_XDECREF(acquire);
    Py_XDECREF(release);
    return made;
}

static PyObject *path_close(PyObject *object, PyObject *unused) {
    drop_layers((HitPathObject *)object);
    return Py_NewRef(Py_None);
}

static PyMethodDef path_methods[] = {
    {"acquire", (PyCFunction)(void (*)(void))path_acquire, METH_FASTCALL | METH_KEYWORDS,
     "acquire($self, layer, *, mode=None, tokens=None, top_k=None, chosen=None, stream=None)\n--\n\n"
     "See DWDPRuntime.acquire."},
    {"release", (PyCFunction)(void (*)(void))path_release, METH_FASTCALL | METH_KEYWORDS,
     "release($self, layer, *, stream=None)\n--\n\nSee DWDPRuntime.release."},
    {"open", path_open, METH_O, "From now on these layers may be hit, by the methods that it returns."},
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

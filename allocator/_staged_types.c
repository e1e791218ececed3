/* The types of _staged.h, as Python sees them: words that it reads and writes. */

#include "_staged.h"

#include <structmember.h>

PyTypeObject *slot_type, *pipeline_type, *layer_type;

int is_layer(PyObject *object) {
    return PyObject_TypeCheck(object, layer_type) && ((LayerObject *)object)->slot;
}

static int slot_traverse(PyObject *object, visitproc visit, void *arg) {
    SlotObject *self = (SlotObject *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->holds);
    Py_VISIT(self->reader);
    Py_VISIT(self->ticket);
    return 0;
}

static int slot_clear(PyObject *object) {
    SlotObject *self = (SlotObject *)object;
    Py_CLEAR(self->holds);
    Py_CLEAR(self->reader);
    Py_CLEAR(self->ticket);
    return 0;
}

static void slot_dealloc(PyObject *object) {
    PyObject_GC_UnTrack(object);
    slot_clear(object);
    free_object(object);
}

static int slot_init(PyObject *object, PyObject *arguments, PyObject *keywords) {
    if (!PyArg_ParseTuple(arguments, ""))
        return -1;
    slot_clear(object);
    ((SlotObject *)object)->read = 1;
    return 0;
}

static PyMemberDef slot_members[] = {
    {"holds", T_OBJECT, offsetof(SlotObject, holds), 0, NULL},
    {"reader", T_OBJECT, offsetof(SlotObject, reader), 0, NULL},
    {"ticket", T_OBJECT, offsetof(SlotObject, ticket), 0, NULL},
    {"read", T_BOOL, offsetof(SlotObject, read), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static int pipeline_traverse(PyObject *object, visitproc visit, void *arg) {
    PipelineObject *self = (PipelineObject *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->driver);
    Py_VISIT(self->issuer);
    Py_VISIT(self->tracer);
    Py_VISIT(self->order);
    Py_VISIT(self->failure);
    return 0;
}

static int pipeline_clear(PyObject *object) {
    PipelineObject *self = (PipelineObject *)object;
    Py_CLEAR(self->driver);
    Py_CLEAR(self->issuer);
    Py_CLEAR(self->tracer);
    Py_CLEAR(self->order);
    Py_CLEAR(self->failure);
    return 0;
}

static void pipeline_dealloc(PyObject *object) {
    PyObject_GC_UnTrack(object);
    pipeline_clear(object);
    free_object(object);
}

static int pipeline_init(PyObject *object, PyObject *arguments, PyObject *keywords) {
    PipelineObject *self = (PipelineObject *)object;
    PyObject *driver, *issuer, *order, *calls, *failure = Py_None;
    PyObject *current_stream;
    unsigned long long get_current, context, is_capturing, wait = 0, record_at = 0;
    int latest;
    if (!PyArg_ParseTuple(arguments, "OOOO!i", &driver, &issuer, &calls, &PyList_Type, &order, &latest))
        return -1;
    if (calls != Py_None && !PyArg_ParseTuple(calls, "KKKKKOO", &get_current, &context, &is_capturing, &wait,
                                               &record_at, &current_stream, &failure))
        return -1;
    pipeline_clear(object);
    self->driver = Py_NewRef(driver);
    self->issuer = Py_NewRef(issuer);
    self->order = Py_NewRef(order);
    self->failure = Py_NewRef(failure);
    self->wait = (WaitEvent)wait;
    self->record = (RecordEvent)record_at;
    self->latest = latest;
    self->prompt = self->timed = self->watched = 0;
    return 0;
}

static PyMemberDef pipeline_members[] = {
    {"driver", T_OBJECT, offsetof(PipelineObject, driver), READONLY, NULL},
    {"issuer", T_OBJECT, offsetof(PipelineObject, issuer), READONLY, NULL},
    {"tracer", T_OBJECT, offsetof(PipelineObject, tracer), 0, NULL},
    {"latest", T_INT, offsetof(PipelineObject, latest), 0, NULL},
    {"prompt", T_BOOL, offsetof(PipelineObject, prompt), 0, NULL},
    {"timed", T_BOOL, offsetof(PipelineObject, timed), 0, NULL},
    {"watched", T_BOOL, offsetof(PipelineObject, watched), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static int layer_traverse(PyObject *object, visitproc visit, void *arg) {
    LayerObject *self = (LayerObject *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->pipeline);
    Py_VISIT(self->slot);
    Py_VISIT(self->following);
    Py_VISIT(self->weights);
    Py_VISIT(self->job);
    return 0;
}

static int layer_clear(PyObject *object) {
    LayerObject *self = (LayerObject *)object;
    Py_CLEAR(self->pipeline);
    Py_CLEAR(self->slot);
    Py_CLEAR(self->following);
    Py_CLEAR(self->weights);
    Py_CLEAR(self->job);
    return 0;
}

static void layer_dealloc(PyObject *object) {
    PyObject_GC_UnTrack(object);
    layer_clear(object);
    PyMem_Free(((LayerObject *)object)->ready);
    free_object(object);
}

static int layer_init(PyObject *object, PyObject *arguments, PyObject *keywords) {
    LayerObject *self = (LayerObject *)object;
    PyObject *pipeline, *slot, *ready;
    unsigned long long consumed, arrived, resumed;
    if (!PyArg_ParseTuple(arguments, "O!O!O!KKK", pipeline_type, &pipeline, slot_type, &slot, &PyTuple_Type, &ready,
                          &consumed, &arrived, &resumed))
        return -1;
    const Py_ssize_t count = PyTuple_Size(ready);
    void **events = PyMem_Calloc(count ? count : 1, sizeof(void *));
    if (!events)
        return PyErr_NoMemory(), -1;
    for (Py_ssize_t i = 0; i < count; i++)
        events[i] = (void *)(uintptr_t)PyLong_AsUnsignedLongLong(PyTuple_GetItem(ready, i));
    if (PyErr_Occurred())
        return PyMem_Free(events), -1;
    layer_clear(object);
    PyMem_Free(self->ready);
    self->ready = events;
    self->num_ready = count;
    self->consumed = (void *)(uintptr_t)consumed;
    self->arrived = (void *)(uintptr_t)arrived;
    self->resumed = (void *)(uintptr_t)resumed;
    self->pipeline = (PipelineObject *)Py_NewRef(pipeline);
    self->slot = (SlotObject *)Py_NewRef(slot);
    return 0;
}

static PyObject *as_bool(int result) {
    return result < 0 ? NULL : PyBool_FromLong(result);
}

static PyObject *layer_enter(PyObject *object, PyObject *stream) {
    void *at = PyLong_AsVoidPtr(stream);
    if (PyErr_Occurred())
        return NULL;
    return as_bool(is_layer(object) ? enter((LayerObject *)object, at) : 0);
}

static PyObject *layer_leave(PyObject *object, PyObject *stream) {
    void *at = PyLong_AsVoidPtr(stream);
    if (PyErr_Occurred())
        return NULL;
    return as_bool(is_layer(object) ? leave((LayerObject *)object, at) : 0);
}

static PyMethodDef layer_methods[] = {
    {"enter", layer_enter, METH_O, "Acquire, if nothing is unusual: whether it was."},
    {"leave", layer_leave, METH_O, "Release, if nothing is unusual: whether it was."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef layer_members[] = {
    {"slot", T_OBJECT, offsetof(LayerObject, slot), READONLY, NULL},
    {"following", T_OBJECT, offsetof(LayerObject, following), 0, NULL},
    {"weights", T_OBJECT, offsetof(LayerObject, weights), 0, NULL},
    {"job", T_OBJECT, offsetof(LayerObject, job), 0, NULL},
    {"nbytes", T_LONGLONG, offsetof(LayerObject, nbytes), 0, NULL},
    {"hits", T_LONGLONG, offsetof(LayerObject, hits), 0, NULL},
    {"misses", T_LONGLONG, offsetof(LayerObject, misses), 0, NULL},
    {"fetched_bytes", T_LONGLONG, offsetof(LayerObject, fetched_bytes), 0, NULL},
    {"place", T_INT, offsetof(LayerObject, place), 0, NULL},
    {"is_first", T_BOOL, offsetof(LayerObject, is_first), 0, NULL},
    {"is_last", T_BOOL, offsetof(LayerObject, is_last), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

#define FLAGS (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC)

static PyType_Slot slot_slots[] = {
    {Py_tp_init, slot_init},
    {Py_tp_members, slot_members},
    {Py_tp_traverse, slot_traverse},
    {Py_tp_clear, slot_clear},
    {Py_tp_dealloc, slot_dealloc},
    {0, NULL},
};
static PyType_Spec slot_spec = {"vmm_dwdp.allocator._native.SlotState", sizeof(SlotObject), 0, FLAGS, slot_slots};

static PyType_Slot pipeline_slots[] = {
    {Py_tp_init, pipeline_init},
    {Py_tp_members, pipeline_members},
    {Py_tp_traverse, pipeline_traverse},
    {Py_tp_clear, pipeline_clear},
    {Py_tp_dealloc, pipeline_dealloc},
    {0, NULL},
};
static PyType_Spec pipeline_spec = {"vmm_dwdp.allocator._native.PipelineState", sizeof(PipelineObject), 0, FLAGS,
                                    pipeline_slots};

static PyType_Slot layer_slots[] = {
    {Py_tp_init, layer_init},
    {Py_tp_methods, layer_methods},
    {Py_tp_members, layer_members},
    {Py_tp_traverse, layer_traverse},
    {Py_tp_clear, layer_clear},
    {Py_tp_dealloc, layer_dealloc},
    {0, NULL},
};
static PyType_Spec layer_spec = {"vmm_dwdp.allocator._native.LayerState", sizeof(LayerObject), 0, FLAGS, layer_slots};

static int add_type(PyObject *module, const char *name, PyType_Spec *spec, PyTypeObject **type) {
    *type = (PyTypeObject *)PyType_FromSpec(spec);
    return *type ? PyModule_AddObjectRef(module, name, (PyObject *)*type) : -1;
}

int add_staged_types(PyObject *module) {
    if (add_type(module, "SlotState", &slot_spec, &slot_type) || add_type(module, "LayerState", &layer_spec, &layer_type))
        return -1;
    return add_type(module, "PipelineState", &pipeline_spec, &pipeline_type);
}

/* vfiotool.native._types: the hot paths as Python types: the window on a region here, `Event` and `Mapper`
 * beside.
 *
 * One register access through cffi costs about 100 ns, and the check of its result in Python half
 * as much again; a method of a C type costs 20. The module knows no exception of vfiotool's: a
 * refused access calls the function that vfio/native.py has set, which raises.
 */
#include "python/module.h"

#include <errno.h>

#include "vfio/mmio.h"

#define POLL_SLICE_NS 50000000u

typedef struct {
	PyObject_HEAD
	struct vt_window window;
	Py_ssize_t polling;
} Window;

static PyObject *refuse_with;

PyObject *vt_refuse(PyObject *self, int reason, uint64_t offset, unsigned width)
{
	PyObject *answer;

	if (!refuse_with) {
		PyErr_Format(PyExc_RuntimeError, "access refused (%d)", reason);
		return NULL;
	}
	answer = PyObject_CallFunction(refuse_with, "OiKI", self, reason,
				       (unsigned long long)offset, width);
	if (answer) {
		Py_DECREF(answer);
		PyErr_SetString(PyExc_RuntimeError, "the refusal was not raised");
	}
	return NULL;
}

static PyObject *refuse(Window *self, int reason, uint64_t offset, unsigned width)
{
	return vt_refuse((PyObject *)self, reason, offset, width);
}

static PyObject *refuse_access(Window *self, uint64_t offset, uint64_t count, unsigned width,
			       uint32_t access)
{
	int reason = vt_window_check(&self->window, offset, count, width, access);

	return refuse(self, reason ? reason : VT_RANGE, offset, width);
}

/* 0, or -1 with an exception set. A number that is no 64-bit offset is out of range. */
static int take_number(PyObject *object, uint64_t *number, int *overflow)
{
	unsigned long long value = PyLong_AsUnsignedLongLong(object);

	*overflow = 0;
	if (value == (unsigned long long)-1 && PyErr_Occurred()) {
		if (!PyErr_ExceptionMatches(PyExc_OverflowError))
			return -1;
		PyErr_Clear();
		*overflow = 1;
		value = UINT64_MAX;
	}
	*number = value;
	return 0;
}

static int take_count(Py_ssize_t given, Py_ssize_t wanted, const char *what)
{
	if (given == wanted)
		return 0;
	PyErr_Format(PyExc_TypeError, "%s takes %zd arguments (%zd given)", what, wanted, given);
	return -1;
}

#define READ_METHOD(bits)                                                                        \
	static PyObject *read##bits(Window *self, PyObject *argument)                            \
	{                                                                                        \
		uint64_t offset;                                                                 \
		int overflow;                                                                    \
                                                                                                 \
		if (take_number(argument, &offset, &overflow))                                   \
			return NULL;                                                             \
		if (!vt_window_allows(&self->window, offset, bits / 8, VT_WINDOW_READ))          \
			return refuse_access(self, offset, 1, bits / 8, VT_WINDOW_READ);         \
		return PyLong_FromUnsignedLongLong(vt_load##bits(&self->window, offset));        \
	}

#define WRITE_METHOD(bits)                                                                       \
	static PyObject *write##bits(Window *self, PyObject *const *arguments, Py_ssize_t count) \
	{                                                                                        \
		uint64_t offset, value;                                                          \
		int overflow;                                                                    \
                                                                                                 \
		if (take_count(count, 2, "write" #bits) ||                                       \
		    take_number(arguments[0], &offset, &overflow))                               \
			return NULL;                                                             \
		if (!vt_window_allows(&self->window, offset, bits / 8, VT_WINDOW_WRITE))         \
			return refuse_access(self, offset, 1, bits / 8, VT_WINDOW_WRITE);        \
		if (take_number(arguments[1], &value, &overflow))                                \
			return NULL;                                                             \
		if (overflow || value != (uint##bits##_t)value)                                  \
			return refuse(self, VT_BAD_VALUE, offset, bits / 8);                        \
		vt_store##bits(&self->window, offset, (uint##bits##_t)value);                    \
		Py_RETURN_NONE;                                                                  \
	}

READ_METHOD(8)
READ_METHOD(16)
READ_METHOD(32)
READ_METHOD(64)
WRITE_METHOD(8)
WRITE_METHOD(16)
WRITE_METHOD(32)
WRITE_METHOD(64)

static int valid_width(unsigned width)
{
	if (width == 1 || width == 2 || width == 4 || width == 8)
		return 1;
	PyErr_SetString(PyExc_ValueError, "the width of an access is 1, 2, 4 or 8 bytes");
	return 0;
}

/* The common part of read_into and write_from: what moves between a buffer and the window. */
static PyObject *move(Window *self, PyObject *arguments, int writing)
{
	unsigned long long offset;
	PyObject *object;
	Py_buffer buffer;
	unsigned width;
	uint64_t count;
	uint32_t access = writing ? VT_WINDOW_WRITE : VT_WINDOW_READ;
	int fifo, reason;

	if (!PyArg_ParseTuple(arguments, "KOIp", &offset, &object, &width, &fifo) ||
	    !valid_width(width))
		return NULL;
	if (PyObject_GetBuffer(object, &buffer, writing ? PyBUF_SIMPLE : PyBUF_WRITABLE))
		return NULL;
	count = (uint64_t)buffer.len / width;
	if (count * width != (uint64_t)buffer.len) {
		PyBuffer_Release(&buffer);
		return refuse(self, VT_ALIGN, offset, width);
	}
	reason = vt_window_check(&self->window, offset, fifo ? 1 : count, width, access);
	if (reason) {
		PyBuffer_Release(&buffer);
		return refuse(self, reason, offset, width);
	}
	/* The lock stays held: otherwise another thread could close the window under the copy. */
	if (writing)
		vt_window_write_many(&self->window, offset, width, !fifo, buffer.buf, count);
	else
		vt_window_read_many(&self->window, offset, width, !fifo, buffer.buf, count);
	PyBuffer_Release(&buffer);
	Py_RETURN_NONE;
}

static PyObject *read_into(Window *self, PyObject *arguments)
{
	return move(self, arguments, 0);
}

static PyObject *write_from(Window *self, PyObject *arguments)
{
	return move(self, arguments, 1);
}

static PyObject *poll_until(Window *self, PyObject *arguments)
{
	unsigned long long offset, mask, wanted, timeout_ns;
	uint64_t value = 0;
	unsigned width;
	int found = 0;

	if (!PyArg_ParseTuple(arguments, "KIKKK", &offset, &width, &mask, &wanted, &timeout_ns) ||
	    !valid_width(width))
		return NULL;
	/* In slices, so that a signal (Ctrl-C) is noticed and a window blocked by another thread is
	 * not read again. `polling` keeps the window mapped while the lock is released. */
	for (;;) {
		uint64_t slice = timeout_ns < POLL_SLICE_NS ? timeout_ns : POLL_SLICE_NS;

		if (!vt_window_allows(&self->window, offset, width, VT_WINDOW_READ))
			return refuse_access(self, offset, 1, width, VT_WINDOW_READ);
		self->polling++;
		Py_BEGIN_ALLOW_THREADS
		found = vt_window_poll(&self->window, offset, width, mask, wanted, slice, &value);
		Py_END_ALLOW_THREADS
		self->polling--;
		timeout_ns -= slice;
		if (found || !timeout_ns)
			break;
		if (PyErr_CheckSignals())
			return NULL;
	}
	return Py_BuildValue("(NK)", PyBool_FromLong(found), (unsigned long long)value);
}

static PyObject *address(Window *self, PyObject *arguments)
{
	unsigned long long offset, length;
	uint32_t access = self->window.granted;
	int reason;

	if (!PyArg_ParseTuple(arguments, "KK", &offset, &length))
		return NULL;
	reason = vt_window_check(&self->window, offset, length, 1, access ? access : 1);
	if (reason)
		return refuse(self, reason, offset, 1);
	return PyLong_FromUnsignedLongLong(
		(uintptr_t)self->window.base + (offset - self->window.start));
}

static PyObject *block(Window *self, PyObject *blocked)
{
	int truth = PyObject_IsTrue(blocked);

	if (truth < 0)
		return NULL;
	vt_window_block(&self->window, truth);
	Py_RETURN_NONE;
}

static PyObject *close_window(Window *self, PyObject *unused)
{
	(void)unused;
	if (self->polling)
		return refuse(self, VT_WINDOW_BUSY, 0, 0);
	/* In a child the range was never inherited; whatever lies there now is not ours. */
	if (self->window.generation == vt_fork_generation)
		vt_window_unmap(&self->window);
	Py_RETURN_NONE;
}

static PyObject *is_closed(Window *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(!self->window.reserved);
}

static PyObject *get_polling(Window *self, void *unused)
{
	(void)unused;
	return PyLong_FromSsize_t(self->polling);
}

static PyObject *get_start(Window *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(self->window.start);
}

static PyObject *get_size(Window *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(self->window.size);
}

static int window_init(Window *self, PyObject *arguments, PyObject *keywords)
{
	unsigned long long position, start, size, alignment;
	unsigned access;
	int fd, result;

	if (keywords && PyDict_Size(keywords)) {
		PyErr_SetString(PyExc_TypeError, "Window takes no keyword arguments");
		return -1;
	}
	if (!PyArg_ParseTuple(arguments, "iKKKIK", &fd, &position, &start, &size, &access,
			      &alignment))
		return -1;
	if (self->window.reserved) {
		PyErr_SetString(PyExc_RuntimeError, "a Window is mapped once");
		return -1;
	}
	result = vt_window_map(&self->window, fd, position, start, size, access, alignment);
	if (result) {
		errno = -result;
		PyErr_SetFromErrno(PyExc_OSError);
		return -1;
	}
	return 0;
}

static void window_dealloc(Window *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	if (self->window.generation == vt_fork_generation)
		vt_window_unmap(&self->window);
	release(self);
	Py_DECREF(type);
}

#define METHOD(name, flags) { #name, (PyCFunction)(void (*)(void))name, flags, NULL }

static PyMethodDef window_methods[] = {
	METHOD(read8, METH_O),
	METHOD(read16, METH_O),
	METHOD(read32, METH_O),
	METHOD(read64, METH_O),
	METHOD(write8, METH_FASTCALL),
	METHOD(write16, METH_FASTCALL),
	METHOD(write32, METH_FASTCALL),
	METHOD(write64, METH_FASTCALL),
	{ "_read_into", (PyCFunction)read_into, METH_VARARGS, NULL },
	{ "_write_from", (PyCFunction)write_from, METH_VARARGS, NULL },
	{ "_poll_until", (PyCFunction)poll_until, METH_VARARGS, NULL },
	METHOD(address, METH_VARARGS),
	{ "_block", (PyCFunction)block, METH_O, NULL },
	{ "_close", (PyCFunction)close_window, METH_NOARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef window_attributes[] = {
	{ "closed", (getter)is_closed, NULL, NULL, NULL },
	{ "polling", (getter)get_polling, NULL, NULL, NULL },
	{ "start", (getter)get_start, NULL, NULL, NULL },
	{ "size", (getter)get_size, NULL, NULL, NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot window_slots[] = {
	{ Py_tp_doc, (void *)"A mapped part of a region: accesses of exact width, bounds checked." },
	{ Py_tp_init, (void *)window_init },
	{ Py_tp_dealloc, (void *)window_dealloc },
	{ Py_tp_methods, window_methods },
	{ Py_tp_getset, window_attributes },
	{ 0, NULL },
};

static PyType_Spec window_spec = {
	.name = "vfiotool.native._types.Window",
	.basicsize = sizeof(Window),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = window_slots,
};

static PyObject *set_refusal(PyObject *module, PyObject *function)
{
	PyObject *old = refuse_with;

	(void)module;
	Py_INCREF(function);
	refuse_with = function;
	Py_XDECREF(old);
	Py_RETURN_NONE;
}

static PyObject *fork_generation(PyObject *module, PyObject *unused)
{
	(void)module;
	(void)unused;
	return PyLong_FromUnsignedLongLong(vt_fork_generation);
}

static PyMethodDef functions[] = {
	{ "set_refusal", set_refusal, METH_O, NULL },
	{ "fork_generation", fork_generation, METH_NOARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

int vt_add_type(PyObject *module, const char *name, PyType_Spec *spec)
{
	PyObject *type = PyType_FromSpec(spec);
	int result = type ? PyModule_AddObjectRef(module, name, type) : -1;

	Py_XDECREF(type);
	return result;
}

static int module_exec(PyObject *module)
{
	vt_watch_forks();
	if (vt_add_type(module, "Window", &window_spec))
		return -1;
	return vt_add_event_type(module) || vt_add_mapper_type(module) ? -1 : 0;
}

static PyModuleDef_Slot module_slots[] = {
	{ Py_mod_exec, (void *)module_exec },
	{ 0, NULL },
};

static struct PyModuleDef module_definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "vfiotool.native._types",
	.m_methods = functions,
	.m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__types(void);

PyMODINIT_FUNC PyInit__types(void)
{
	return PyModuleDef_Init(&module_definition);
}

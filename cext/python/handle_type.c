/* vfiotool.native._types.Handle: a descriptor that is never closed under a call.
 *
 * The kernel gives a closed number to the next file that is opened. A call in one thread on a
 * number that another thread has closed may so reach a file of somebody else's. Every use takes the
 * handle first and gives it back; closing refuses new uses at once and closes the number with the
 * last one.
 */
#include "python/module.h"

#include <errno.h>
#include <unistd.h>

#include "vfio/mmio.h"

typedef struct {
	PyObject_HEAD
	int number; /* the descriptor plus one: what __new__ leaves is closed */
	int closing;
	Py_ssize_t users;
} Handle;

static void handle_dealloc(Handle *self);

static Handle *as_handle(PyObject *object)
{
	PyTypeObject *type = object ? Py_TYPE(object) : NULL;

	/* Its own destructor tells the type from all others; Python's subclasses have another. */
	while (type && PyType_GetSlot(type, Py_tp_dealloc) != (void *)handle_dealloc) {
		if (!(PyType_GetFlags(type) & Py_TPFLAGS_HEAPTYPE))
			return NULL;
		type = PyType_GetSlot(type, Py_tp_base);
	}
	return type ? (Handle *)object : NULL;
}

static void close_number(Handle *self)
{
	int fd = self->number - 1;

	self->number = 0;
	if (fd >= 0)
		close(fd);
}

int vt_handle_take(PyObject *object)
{
	Handle *self = as_handle(object);

	if (object && object != Py_None && !self)
		return -EINVAL;
	if (!self || !self->number || self->closing)
		return -EBADF;
	self->users++;
	return self->number - 1;
}

void vt_handle_give(PyObject *object)
{
	Handle *self = as_handle(object);

	if (!self || self->users <= 0)
		return;
	if (!--self->users && self->closing)
		close_number(self);
}

static PyObject *enter(PyObject *self, PyObject *unused)
{
	int fd = vt_handle_take(self);

	(void)unused;
	if (fd < 0)
		return vt_refuse(self, VT_CLOSED, 0, 0);
	return PyLong_FromLong(fd);
}

static PyObject *leave(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
	(void)arguments;
	(void)count;
	vt_handle_give(self);
	Py_RETURN_NONE;
}

static PyObject *close_handle(Handle *self, PyObject *arguments)
{
	int at_once = 0;

	if (!PyArg_ParseTuple(arguments, "|p", &at_once))
		return NULL;
	self->closing = 1;
	if (!self->users || at_once)
		close_number(self);
	Py_RETURN_NONE;
}

static PyObject *is_closed(Handle *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(self->closing || !self->number);
}

static PyObject *get_users(Handle *self, void *unused)
{
	(void)unused;
	return PyLong_FromSsize_t(self->users);
}

static PyObject *get_number(Handle *self, void *unused)
{
	(void)unused;
	return PyLong_FromLong(self->closing ? -1 : self->number - 1);
}

static int handle_init(Handle *self, PyObject *arguments, PyObject *keywords)
{
	int fd;

	if (keywords && PyDict_Size(keywords)) {
		PyErr_SetString(PyExc_TypeError, "Handle takes no keyword arguments");
		return -1;
	}
	if (!PyArg_ParseTuple(arguments, "i", &fd))
		return -1;
	if (self->number || fd < 0) {
		PyErr_SetString(PyExc_ValueError, "a Handle has one open descriptor");
		return -1;
	}
	self->number = fd + 1;
	return 0;
}

static void handle_dealloc(Handle *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	close_number(self);
	release(self);
	Py_DECREF(type);
}

static PyMethodDef handle_methods[] = {
	{ "__enter__", enter, METH_NOARGS,
	  "The descriptor, which stays open until the end of the `with`. Raises UsageError once it is\n"
	  "closed." },
	{ "__exit__", (PyCFunction)(void (*)(void))leave, METH_FASTCALL, NULL },
	{ "close", (PyCFunction)close_handle, METH_VARARGS,
	  "close($self, at_once=False, /)\n--\n\n"
	  "Refuse new uses from now on, and close the descriptor with the last use; or now, in a child\n"
	  "of the process that used it, where nobody else runs. Closing twice is nothing." },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef handle_attributes[] = {
	{ "closed", (getter)(void (*)(void))is_closed, NULL, "Whether `close` was called.", NULL },
	{ "users", (getter)(void (*)(void))get_users, NULL, "How many uses are under way.", NULL },
	{ "number", (getter)(void (*)(void))get_number, NULL,
	  "The descriptor, for looking only: it may be closed at any time. -1 once it is closed.",
	  NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot handle_slots[] = {
	{ Py_tp_doc,
	  (void *)"Handle(descriptor)\n--\n\n"
		  "A descriptor that is never closed under a call: `with handle as fd`." },
	{ Py_tp_init, (void *)handle_init },
	{ Py_tp_dealloc, (void *)handle_dealloc },
	{ Py_tp_methods, handle_methods },
	{ Py_tp_getset, handle_attributes },
	{ 0, NULL },
};

static PyType_Spec handle_spec = {
	.name = "vfiotool.native._types.Handle",
	.basicsize = sizeof(Handle),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = handle_slots,
};

int vt_add_handle_type(PyObject *module)
{
	return vt_add_type(module, "Handle", &handle_spec);
}

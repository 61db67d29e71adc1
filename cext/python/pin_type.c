/* vfiotool.native._types.PinCount: the base of memory that is not closed while a device, or C, uses
 * it. Counted in C, where each command of a queue pins its buffers: no other thread and no signal
 * comes between the count and what goes with it.
 */
#include "python/queue_types.h"

#include <stddef.h>
#include <structmember.h>

static void pin_dealloc(PyObject *self)
{
	PyTypeObject *type = Py_TYPE(self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	release(self);
	Py_DECREF(type);
}

PyTypeObject *vt_as_pin_type(PyObject *object)
{
	if (PyType_Check(object) &&
	    PyType_GetSlot((PyTypeObject *)object, Py_tp_dealloc) == (void *)pin_dealloc)
		return (PyTypeObject *)object;
	PyErr_SetString(PyExc_TypeError, "not the type PinCount");
	return NULL;
}

static PyObject *pin(PinCount *self, PyObject *unused)
{
	(void)unused;
	if (self->closed)
		return PyObject_CallMethod((PyObject *)self, "_refuse_pin", NULL);
	self->pins++;
	Py_RETURN_NONE;
}

static PyObject *unpin(PinCount *self, PyObject *unused)
{
	(void)unused;
	if (!self->pins) {
		PyErr_SetString(PyExc_RuntimeError, "it is not pinned");
		return NULL;
	}
	/* Before it is counted: what an interrupt left undone is done when this is called again. */
	if (self->pins == 1 && self->closed) {
		PyObject *answer = PyObject_CallMethod((PyObject *)self, "_unpinned", NULL);

		if (!answer)
			return NULL;
		Py_DECREF(answer);
	}
	self->pins--;
	Py_RETURN_NONE;
}

static PyObject *shut(PinCount *self, PyObject *unused)
{
	(void)unused;
	self->closed = 1;
	Py_RETURN_NONE;
}

static PyObject *hook(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	Py_RETURN_NONE;
}

static PyMethodDef pin_methods[] = {
	{ "pin", (PyCFunction)pin, METH_NOARGS,
	  "pin($self, /)\n--\n\n"
	  "Keep it mapped, at this address, until `unpin`: a device, or C, is about to use it.\n"
	  "`close` raises UsageError meanwhile; if its address space is closed all the same, the\n"
	  "memory itself stays. Raises UsageError once it is closed." },
	{ "unpin", (PyCFunction)unpin, METH_NOARGS,
	  "unpin($self, /)\n--\n\n"
	  "The counterpart of one `pin`; allowed after the address space was closed." },
	{ "_shut", (PyCFunction)shut, METH_NOARGS, "No `pin` from now on." },
	{ "_refuse_pin", hook, METH_NOARGS, "Raises; `pin` calls it once it is shut." },
	{ "_unpinned", hook, METH_NOARGS, "Called by the last `unpin` once it is shut." },
	{ NULL, NULL, 0, NULL },
};

static PyMemberDef pin_members[] = {
	{ "pins", T_PYSSIZET, offsetof(PinCount, pins), READONLY, "How many pins there are." },
	{ "closed", T_BOOL, offsetof(PinCount, closed), READONLY, "Whether it was closed." },
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot pin_slots[] = {
	{ Py_tp_doc, (void *)"PinCount()\n--\n\nMemory that cannot be closed while it is pinned." },
	{ Py_tp_dealloc, (void *)pin_dealloc },
	{ Py_tp_methods, pin_methods },
	{ Py_tp_members, pin_members },
	{ 0, NULL },
};

static PyType_Spec pin_spec = {
	.name = "vfiotool.native._types.PinCount",
	.basicsize = sizeof(PinCount),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = pin_slots,
};

int vt_add_pin_type(PyObject *module)
{
	return vt_add_type(module, "PinCount", &pin_spec);
}

/* vfiotool.native._types.GuestMemory: a front end's memory as views, found by address.
 *
 * The views are Python's, made by native/direct.py over a map that each of them keeps. They are
 * pinned here: C reads and writes what they cover.
 */
#include "python/direct_types.h"

#include <stdlib.h>

struct vt_guest_region {
	Py_buffer pinned;
	PyObject *view;
};

static void guest_dealloc(GuestMemory *self);

GuestMemory *vt_as_guest_memory(PyObject *object)
{
	if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)guest_dealloc &&
	    ((GuestMemory *)object)->map)
		return (GuestMemory *)object;
	PyErr_SetString(PyExc_TypeError, "not a GuestMemory of a map");
	return NULL;
}

PyObject *vt_guest_view(const GuestMemory *memory, const struct iovec *segment)
{
	uintptr_t address = (uintptr_t)segment->iov_base;
	uint32_t low = 0, high = memory->count;
	Py_ssize_t offset;

	if (!high) {
		PyErr_SetString(PyExc_RuntimeError, "a request in memory of no regions");
		return NULL;
	}
	/* The last region that does not begin behind it. */
	while (high - low > 1) {
		uint32_t middle = low + (high - low) / 2;

		if ((uintptr_t)memory->regions[middle].pinned.buf <= address)
			low = middle;
		else
			high = middle;
	}
	offset = (Py_ssize_t)(address - (uintptr_t)memory->regions[low].pinned.buf);
	return PySequence_GetSlice(memory->regions[low].view, offset,
				   offset + (Py_ssize_t)segment->iov_len);
}

/* Pins one more view. 0, or -1 with an exception set. */
static int add_region(GuestMemory *self, PyObject *view)
{
	struct vt_guest_region *last = self->count ? &self->regions[self->count - 1] : NULL;
	struct vt_guest_region *next = &self->regions[self->count];

	if (PyObject_GetBuffer(view, &next->pinned, PyBUF_WRITABLE))
		return -1;
	if (last && (uintptr_t)next->pinned.buf <
			    (uintptr_t)last->pinned.buf + (uintptr_t)last->pinned.len) {
		PyBuffer_Release(&next->pinned);
		PyErr_SetString(PyExc_ValueError, "the views are not in the order of addresses");
		return -1;
	}
	next->view = Py_NewRef(view);
	self->count++;
	return 0;
}

static int guest_init(GuestMemory *self, PyObject *arguments, PyObject *keywords)
{
	unsigned long long map;
	PyObject *views;
	Py_ssize_t count;

	if (keywords && PyDict_Size(keywords)) {
		PyErr_SetString(PyExc_TypeError, "GuestMemory takes no keyword arguments");
		return -1;
	}
	if (!PyArg_ParseTuple(arguments, "KO!", &map, &PyList_Type, &views))
		return -1;
	count = PyList_Size(views);
	if (self->map || !map) {
		PyErr_SetString(PyExc_ValueError, "GuestMemory has one map and its views");
		return -1;
	}
	self->regions = calloc((size_t)count + 1, sizeof(*self->regions));
	if (!self->regions) {
		PyErr_NoMemory();
		return -1;
	}
	self->map = (struct vt_memory *)(uintptr_t)map;
	for (Py_ssize_t i = 0; i < count; i++)
		if (add_region(self, PyList_GetItem(views, i)))
			return -1;
	return 0;
}

static void guest_dealloc(GuestMemory *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	for (uint32_t i = 0; i < self->count; i++) {
		PyBuffer_Release(&self->regions[i].pinned);
		Py_DECREF(self->regions[i].view);
	}
	free(self->regions);
	release(self);
	Py_DECREF(type);
}

static PyType_Slot guest_slots[] = {
	{ Py_tp_doc,
	  (void *)"GuestMemory(map, views, /)\n--\n\n"
		  "The regions of a memory map, whose address `map` is, as writable views by address." },
	{ Py_tp_init, (void *)guest_init },
	{ Py_tp_dealloc, (void *)guest_dealloc },
	{ 0, NULL },
};

static PyType_Spec guest_spec = {
	.name = "vfiotool.native._types.GuestMemory",
	.basicsize = sizeof(GuestMemory),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = guest_slots,
};

int vt_add_guest_type(PyObject *module)
{
	return vt_add_type(module, "GuestMemory", &guest_spec);
}

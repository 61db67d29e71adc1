/* vfiotool.native._types.QueueCommand and SentCommand: a command of an NVMe queue pair before and
 * after it was sent.
 */
#include "python/queue_types.h"

#include <stddef.h>
#include <structmember.h>

static void command_dealloc(QueueCommand *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);

	PyObject_GC_UnTrack(self);
	Py_XDECREF((PyObject *)self->calls);
	Py_XDECREF(self->check);
	PyObject_GC_Del(self);
	Py_DECREF(type);
}

QueueCommand *vt_queue_command(PyObject *object)
{
	PyTypeObject *type = Py_TYPE(object);

	/* Nothing is derived from it. */
	if (PyType_GetSlot(type, Py_tp_dealloc) != (void *)command_dealloc)
		return NULL;
	return (QueueCommand *)object;
}

static int command_traverse(QueueCommand *self, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE((PyObject *)self));
	Py_VISIT((PyObject *)self->calls);
	Py_VISIT(self->check);
	return 0;
}

static PyObject *command_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
	static const uint64_t limits[] = { UINT8_MAX,  UINT32_MAX, UINT64_MAX, UINT32_MAX,
					   UINT64_MAX, UINT32_MAX, UINT16_MAX };
	enum { FIELDS = sizeof(limits) / sizeof(*limits) };
	QueueCommand *made;
	QueueCalls *calls;
	uint64_t values[FIELDS];

	if ((keywords && PyDict_Size(keywords)) || PyTuple_Size(arguments) != FIELDS + 2) {
		PyErr_SetString(PyExc_TypeError, "QueueCommand takes 9 arguments");
		return NULL;
	}
	calls = vt_as_queue_calls(PyTuple_GetItem(arguments, 0));
	if (!calls)
		return NULL;
	for (Py_ssize_t i = 0; i < FIELDS; i++)
		if (vt_take_number(PyTuple_GetItem(arguments, i + 2), limits[i], &values[i]))
			return NULL;
	made = PyObject_GC_New(QueueCommand, type);
	if (!made)
		return NULL;
	made->calls = (QueueCalls *)Py_NewRef((PyObject *)calls);
	made->check = Py_NewRef(PyTuple_GetItem(arguments, 1));
	made->io = (struct vt_nvme_io){
		.opcode = (uint8_t)values[0],
		.nsid = (uint32_t)values[1],
		.lba = values[2],
		.blocks = (uint32_t)values[3],
		.iova = values[4],
		.bytes = (uint32_t)values[5],
		.control = (uint16_t)values[6],
	};
	PyObject_GC_Track(made);
	return (PyObject *)made;
}

static PyObject *command_call(QueueCommand *self, PyObject *arguments, PyObject *keywords)
{
	struct vt_nvme_io io = self->io;
	PyObject *answer;
	int result;

	if ((keywords && PyDict_Size(keywords)) || PyTuple_Size(arguments) != 1) {
		PyErr_SetString(PyExc_TypeError, "a command is sent with its tag");
		return NULL;
	}
	if (vt_take_number(PyTuple_GetItem(arguments, 0), UINT64_MAX, &io.tag))
		return NULL;
	result = self->calls->submit(self->calls->queue, &io, 1);
	if (result >= 0)
		return PyBool_FromLong(result);
	answer = PyObject_CallFunction(self->check, "i", result);
	if (answer) {
		Py_DECREF(answer);
		PyErr_SetString(PyExc_RuntimeError, "the refusal was not raised");
	}
	return NULL;
}

static PyType_Slot command_slots[] = {
	{ Py_tp_doc,
	  (void *)"QueueCommand(calls, check, opcode, nsid, lba, blocks, iova, size_bytes, control)\n"
		  "--\n\n"
		  "A command for the queue pair of `calls`; called with its tag it is sent: whether\n"
		  "there was room. `check` is called with the negative errno of what is refused, and\n"
		  "raises. Raises OverflowError for a number that its field cannot hold." },
	{ Py_tp_new, (void *)command_new },
	{ Py_tp_dealloc, (void *)command_dealloc },
	{ Py_tp_traverse, (void *)command_traverse },
	{ Py_tp_call, (void *)command_call },
	{ 0, NULL },
};

static PyType_Spec command_spec = {
	.name = "vfiotool.native._types.QueueCommand",
	.basicsize = sizeof(QueueCommand),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.slots = command_slots,
};

static int sent_clear(SentCommand *self)
{
	Py_CLEAR(self->send);
	Py_CLEAR(self->holds);
	Py_CLEAR(self->ended);
	return 0;
}

static void sent_dealloc(SentCommand *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);

	PyObject_GC_UnTrack(self);
	sent_clear(self);
	PyObject_GC_Del(self);
	Py_DECREF(type);
}

static int sent_traverse(SentCommand *self, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE((PyObject *)self));
	Py_VISIT(self->send);
	Py_VISIT(self->holds);
	Py_VISIT(self->ended);
	return 0;
}

PyTypeObject *vt_as_sent_type(PyObject *object)
{
	if (PyType_Check(object) &&
	    PyType_GetSlot((PyTypeObject *)object, Py_tp_dealloc) == (void *)sent_dealloc)
		return (PyTypeObject *)object;
	PyErr_SetString(PyExc_TypeError, "not the type SentCommand");
	return NULL;
}

SentCommand *vt_sent_new(PyTypeObject *type, PyObject *send, PyObject *holds)
{
	SentCommand *made = PyObject_GC_New(SentCommand, type);

	if (!made)
		return NULL;
	made->send = Py_NewRef(send);
	made->holds = Py_NewRef(holds);
	made->ended = Py_NewRef(Py_None);
	made->tag = made->latency_ns = 0;
	made->pinned = 0;
	made->place = -1;
	made->result = 0;
	made->status = 0;
	made->call = 1;
	made->late = 0;
	PyObject_GC_Track(made);
	return made;
}

static PyObject *sent_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
	PyObject *send, *holds, *ended;
	unsigned long long tag;
	SentCommand *made;
	int call, place;

	if (keywords && PyDict_Size(keywords)) {
		PyErr_SetString(PyExc_TypeError, "SentCommand takes no keyword arguments");
		return NULL;
	}
	if (!PyArg_ParseTuple(arguments, "KOOpOi", &tag, &send, &holds, &call, &ended, &place))
		return NULL;
	made = vt_sent_new(type, send, holds);
	if (!made)
		return NULL;
	Py_DECREF(made->ended);
	made->ended = Py_NewRef(ended);
	made->tag = tag;
	made->call = (char)call;
	made->place = place;
	return (PyObject *)made;
}

static PyObject *end(SentCommand *self, PyObject *arguments)
{
	unsigned long long latency_ns;
	unsigned status, result;

	if (!PyArg_ParseTuple(arguments, "IIK", &status, &result, &latency_ns))
		return NULL;
	self->status = (unsigned short)status;
	self->result = result;
	self->latency_ns = latency_ns;
	Py_RETURN_NONE;
}

/* No signal's handler comes between a pin and its count: 0, or -1 with an exception set. */
static int change_pin(const SentCommand *self, Py_ssize_t place, const char *method)
{
	PyObject *buffer = PySequence_GetItem(self->holds, place);
	PyObject *answer = buffer ? PyObject_CallMethod(buffer, method, NULL) : NULL;

	Py_XDECREF(buffer);
	Py_XDECREF(answer);
	return answer ? 0 : -1;
}

static PyObject *pin(SentCommand *self, PyObject *unused)
{
	Py_ssize_t count = PySequence_Size(self->holds);

	(void)unused;
	if (count < 0)
		return NULL;
	for (; self->pinned < count; self->pinned++)
		if (change_pin(self, self->pinned, "pin"))
			return NULL;
	Py_RETURN_NONE;
}

static PyObject *unpin(SentCommand *self, PyObject *unused)
{
	(void)unused;
	for (; self->pinned; self->pinned--)
		if (change_pin(self, self->pinned - 1, "unpin"))
			return NULL;
	Py_RETURN_NONE;
}

static PyMethodDef sent_methods[] = {
	{ "pin", (PyCFunction)pin, METH_NOARGS,
	  "pin($self, /)\n--\n\nPin the rest of `holds`; what failed can be tried again." },
	{ "unpin", (PyCFunction)unpin, METH_NOARGS,
	  "unpin($self, /)\n--\n\nLet go of what is pinned; what failed can be tried again." },
	{ "end", (PyCFunction)end, METH_VARARGS,
	  "end($self, status, result, latency_ns, /)\n--\n\nWhat its completion says." },
	{ NULL, NULL, 0, NULL },
};

#define MEMBER(name, type, access, text)                                                           \
	{ #name, type, offsetof(SentCommand, name), access, text }

static PyMemberDef sent_members[] = {
	MEMBER(tag, T_ULONGLONG, READONLY, "The caller's tag."),
	MEMBER(send, T_OBJECT, READONLY, "Sends it with a number as its tag: whether there was room."),
	MEMBER(holds, T_OBJECT, READONLY, "The buffers that the device may reach."),
	MEMBER(ended, T_OBJECT, 0, "Told of its completion, or None."),
	MEMBER(call, T_BOOL, READONLY, "Whether a call waits for it, not a poll."),
	MEMBER(place, T_INT, READONLY, "Of the bounce buffer, where it uses one; or -1."),
	MEMBER(late, T_BOOL, 0, "Whether nobody waits for it any more."),
	MEMBER(pinned, T_PYSSIZET, READONLY, "How many of `holds` are pinned for it."),
	MEMBER(status, T_USHORT, READONLY, "Of its completion."),
	MEMBER(result, T_UINT, READONLY, "Of its completion."),
	MEMBER(latency_ns, T_ULONGLONG, READONLY, "Of its completion."),
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot sent_slots[] = {
	{ Py_tp_doc, (void *)"SentCommand(tag, send, holds, call, ended, place)\n--\n\n"
			     "A command that is out, or has ended and was not asked for yet." },
	{ Py_tp_new, (void *)sent_new },
	{ Py_tp_dealloc, (void *)sent_dealloc },
	{ Py_tp_traverse, (void *)sent_traverse },
	{ Py_tp_clear, (void *)sent_clear },
	{ Py_tp_methods, sent_methods },
	{ Py_tp_members, sent_members },
	{ 0, NULL },
};

static PyType_Spec sent_spec = {
	.name = "vfiotool.native._types.SentCommand",
	.basicsize = sizeof(SentCommand),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.slots = sent_slots,
};

int vt_add_command_types(PyObject *module)
{
	if (vt_add_type(module, "QueueCommand", &command_spec))
		return -1;
	return vt_add_type(module, "SentCommand", &sent_spec);
}

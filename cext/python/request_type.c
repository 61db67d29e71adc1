/* vfiotool.native._types.QueueRequest: one request of a driver, with its segments.
 *
 * What lies in the guest's memory is copied here, or shown by views that are made when they are
 * asked for. The request keeps the memory that it was fetched from, so nothing of it dangles
 * whatever becomes of its queue. The lock of the interpreter is held throughout: nothing waits.
 */
#include "python/direct_types.h"

#include <string.h>

static void request_dealloc(QueueRequest *self);

PyTypeObject *vt_as_request_type(PyObject *object)
{
	if (PyType_Check(object) && PyType_GetSlot((PyTypeObject *)object, Py_tp_dealloc) ==
					    (void *)request_dealloc)
		return (PyTypeObject *)object;
	PyErr_SetString(PyExc_TypeError, "not the type QueueRequest");
	return NULL;
}

PyObject *vt_request_new(DirectQueue *queue, const struct vt_chain *chain,
			 const struct iovec *segments)
{
	Py_ssize_t count = chain->readable + chain->writable;
	QueueRequest *made = PyObject_GC_NewVar(QueueRequest, queue->requests, count);

	if (!made)
		return NULL;
	made->queue = (DirectQueue *)Py_NewRef((PyObject *)queue);
	made->memory = (GuestMemory *)Py_NewRef((PyObject *)queue->memory);
	made->readable = made->writable = NULL;
	made->is_complete = 0;
	made->chain = *chain;
	made->chain.first = 0;
	memcpy(made->segments, segments + chain->first, (size_t)count * sizeof(*segments));
	made->before = NULL;
	made->after = queue->in_flight;
	if (made->after)
		made->after->before = made;
	queue->in_flight = (QueueRequest *)Py_NewRef((PyObject *)made);
	made->is_listed = 1;
	PyObject_GC_Track(made);
	return (PyObject *)made;
}

void vt_request_leave(QueueRequest *request)
{
	if (!request->is_listed)
		return;
	request->is_listed = 0;
	if (request->before)
		request->before->after = request->after;
	else
		request->queue->in_flight = request->after;
	if (request->after)
		request->after->before = request->before;
	request->before = request->after = NULL;
	Py_DECREF((PyObject *)request);
}

static const struct iovec *segments_of(const QueueRequest *self, int writable)
{
	return self->segments + (writable ? self->chain.readable : 0);
}

static uint32_t count_of(const QueueRequest *self, int writable)
{
	return writable ? self->chain.writable : self->chain.readable;
}

/* A list of views over `size` bytes from `offset` on, as far as there are so many. */
static PyObject *views(const QueueRequest *self, int writable, size_t offset, size_t size)
{
	const struct iovec *segments = segments_of(self, writable);
	PyObject *found = PyList_New(0);

	for (uint32_t i = 0; found && size && i < count_of(self, writable); i++) {
		struct iovec part = segments[i];
		PyObject *view;
		int failed;

		if (offset >= part.iov_len) {
			offset -= part.iov_len;
			continue;
		}
		part.iov_base = (uint8_t *)part.iov_base + offset;
		part.iov_len -= offset;
		offset = 0;
		if (part.iov_len > size)
			part.iov_len = size;
		size -= part.iov_len;
		view = vt_guest_view(self->memory, &part);
		failed = !view || PyList_Append(found, view);
		Py_XDECREF(view);
		if (failed)
			Py_CLEAR(found);
	}
	return found;
}

/* A number of bytes: `*size` stays as it is for None and without an object. 0, or -1 with an
 * exception set. */
static int take_size(PyObject *object, size_t *size)
{
	if (object && object != Py_None)
		*size = PyLong_AsSize_t(object);
	return *size == (size_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static PyObject *part(const QueueRequest *self, int writable, const char *function,
		      PyObject *const *given, Py_ssize_t count, PyObject *keywords)
{
	static const char *const names[] = { "offset", "size", NULL };
	size_t offset = 0, size = SIZE_MAX;
	PyObject *taken[2];

	if (vt_take_arguments(function, names, given, count, keywords, taken) ||
	    take_size(taken[0], &offset) || take_size(taken[1], &size))
		return NULL;
	return views(self, writable, offset, size);
}

static PyObject *readable_part(QueueRequest *self, PyObject *const *given, Py_ssize_t count,
			       PyObject *keywords)
{
	return part(self, 0, "readable_part", given, count, keywords);
}

static PyObject *writable_part(QueueRequest *self, PyObject *const *given, Py_ssize_t count,
			       PyObject *keywords)
{
	return part(self, 1, "writable_part", given, count, keywords);
}

static PyObject *data(QueueRequest *self, PyObject *const *given, Py_ssize_t count,
		      PyObject *keywords)
{
	static const char *const names[] = { "size", NULL };
	size_t size = self->chain.readable_bytes;
	PyObject *taken[1], *found;
	char *to;

	if (vt_take_arguments("data", names, given, count, keywords, taken) ||
	    take_size(taken[0], &size))
		return NULL;
	if (size > self->chain.readable_bytes)
		size = self->chain.readable_bytes;
	found = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
	to = found ? PyBytes_AsString(found) : NULL;
	for (const struct iovec *from = self->segments; to && size; from++) {
		size_t length = from->iov_len < size ? from->iov_len : size;

		memcpy(to, from->iov_base, length);
		to += length;
		size -= length;
	}
	return found;
}

static size_t copy_in(const QueueRequest *self, const uint8_t *from, size_t size, size_t offset)
{
	const struct iovec *to = segments_of(self, 1);
	size_t done = 0;

	for (uint32_t i = 0; i < self->chain.writable && done < size; i++) {
		size_t length;

		if (offset >= to[i].iov_len) {
			offset -= to[i].iov_len;
			continue;
		}
		length = to[i].iov_len - offset;
		if (length > size - done)
			length = size - done;
		/* What is copied may be the guest's memory as well. */
		memmove((uint8_t *)to[i].iov_base + offset, from + done, length);
		done += length;
		offset = 0;
	}
	return done;
}

static PyObject *write_data(QueueRequest *self, PyObject *const *given, Py_ssize_t count,
			    PyObject *keywords)
{
	static const char *const names[] = { "data", "offset", NULL };
	PyObject *taken[2];
	size_t offset = 0, done;
	Py_buffer from;

	if (vt_take_arguments("write", names, given, count, keywords, taken))
		return NULL;
	if (!taken[0]) {
		PyErr_SetString(PyExc_TypeError, "write needs bytes");
		return NULL;
	}
	if (take_size(taken[1], &offset) || PyObject_GetBuffer(taken[0], &from, PyBUF_SIMPLE))
		return NULL;
	done = copy_in(self, from.buf, (size_t)from.len, offset);
	PyBuffer_Release(&from);
	return PyLong_FromSize_t(done);
}

/* Ends the request in its queue. 0, or -1 with an exception set. */
static int end(QueueRequest *self, PyObject *number)
{
	DirectQueue *queue = self->queue;
	long long written = 0;
	int overflow = 0;

	if (self->is_complete) {
		vt_direct_refuse(queue, VT_REQUEST_COMPLETE, NULL, 0);
		return -1;
	}
	if (number)
		written = PyLong_AsLongLongAndOverflow(number, &overflow);
	if (written == -1 && PyErr_Occurred())
		return -1;
	if (overflow || written < 0 || written > self->chain.writable_bytes) {
		vt_direct_refuse(queue, VT_REQUEST_WRITTEN, number, self->chain.writable_bytes);
		return -1;
	}
	if (queue->queue) {
		if (vt_direct_check_thread(queue))
			return -1;
		queue->calls->complete(queue->queue, self->memory->map, &self->chain,
				       self->segments, (uint32_t)written);
	}
	self->is_complete = 1;
	vt_request_leave(self);
	return 0;
}

static PyObject *complete(QueueRequest *self, PyObject *const *given, Py_ssize_t count,
			  PyObject *keywords)
{
	static const char *const names[] = { "written", NULL };
	PyObject *taken[1], *call, *answer;

	if (vt_take_arguments("complete", names, given, count, keywords, taken) ||
	    end(self, taken[0]))
		return NULL;
	if (!self->queue->queue || !self->queue->completed)
		Py_RETURN_NONE;
	/* It may put another one in its place. */
	call = Py_NewRef(self->queue->completed);
	answer = PyObject_CallNoArgs(call);
	Py_DECREF(call);
	return answer;
}

static PyObject *representation(QueueRequest *self)
{
	return PyUnicode_FromFormat("<QueueRequest %u, %u+%u bytes, %s>", self->chain.head,
				    self->chain.readable_bytes, self->chain.writable_bytes,
				    self->is_complete ? "complete" : "in flight");
}

/* All views of one kind, made once. */
static PyObject *shown(QueueRequest *self, int writable, PyObject **list)
{
	PyObject *made;

	if (*list)
		return Py_NewRef(*list);
	made = views(self, writable, 0, SIZE_MAX);
	/* A collection meanwhile may have asked for them too. */
	if (made && !*list)
		*list = Py_NewRef(made);
	return made;
}

static PyObject *get_readable(QueueRequest *self, void *unused)
{
	(void)unused;
	return shown(self, 0, &self->readable);
}

static PyObject *get_writable(QueueRequest *self, void *unused)
{
	(void)unused;
	return shown(self, 1, &self->writable);
}

static PyObject *get_head(QueueRequest *self, void *unused)
{
	(void)unused;
	return PyLong_FromLong(self->chain.head);
}

static PyObject *get_read_bytes(QueueRequest *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLong(self->chain.readable_bytes);
}

static PyObject *get_room(QueueRequest *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLong(self->chain.writable_bytes);
}

static PyObject *get_is_complete(QueueRequest *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(self->is_complete);
}

/* Without tp_clear: what leads back to a request goes through its queue or a list. */
static int request_traverse(QueueRequest *self, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE((PyObject *)self));
	Py_VISIT((PyObject *)self->queue);
	Py_VISIT(self->readable);
	Py_VISIT(self->writable);
	return 0;
}

static void request_dealloc(QueueRequest *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);

	PyObject_GC_UnTrack(self);
	Py_XDECREF(self->readable);
	Py_XDECREF(self->writable);
	Py_DECREF((PyObject *)self->queue);
	Py_DECREF((PyObject *)self->memory);
	PyObject_GC_Del(self);
	Py_DECREF(type);
}

#define METHOD(name, function, text)                                                               \
	{ name, (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS, text }

static PyMethodDef request_methods[] = {
	METHOD("data", data,
	       "data($self, size=None)\n--\n\n"
	       "All that is readable, or its first `size` bytes, copied, as one string of bytes."),
	METHOD("write", write_data,
	       "write($self, data, offset=0)\n--\n\n"
	       "Copy bytes into the writable views from `offset` on; returns how many found room."),
	METHOD("readable_part", readable_part,
	       "readable_part($self, offset=0, size=None)\n--\n\n"
	       "Views over `size` readable bytes from `offset` on, or all that follow: fewer where\n"
	       "there are fewer."),
	METHOD("writable_part", writable_part,
	       "writable_part($self, offset=0, size=None)\n--\n\n"
	       "Views over `size` writable bytes from `offset` on, or all that follow: fewer where\n"
	       "there are fewer."),
	METHOD("complete", complete,
	       "complete($self, written=0)\n--\n\n"
	       "End it, saying that the first `written` writable bytes were written.\n\n"
	       "Raises UsageError if it has ended, for more bytes than there are, and in another\n"
	       "thread than the queue's. After its queue was stopped this does nothing: the request\n"
	       "is the next back end's, by the in-flight log."),
	{ NULL, NULL, 0, NULL },
};

#define ATTRIBUTE(name, text) { #name, (getter)(void (*)(void))get_##name, NULL, text, NULL }

static PyGetSetDef request_attributes[] = {
	ATTRIBUTE(head, "Its number among those in flight."),
	ATTRIBUTE(readable, "What the driver sends, as views in its order."),
	ATTRIBUTE(writable, "Where the device answers, as views in the driver's order."),
	ATTRIBUTE(read_bytes, "How many bytes are readable."),
	ATTRIBUTE(room, "How many bytes are writable."),
	ATTRIBUTE(is_complete, "Whether `complete` has ended it."),
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot request_slots[] = {
	{ Py_tp_doc,
	  (void *)"One request of a driver: what the device reads, and where it writes.\n\n"
		  "`readable` and `writable` are views over the guest's memory in the driver's order,\n"
		  "which the guest may change at any time: copy what is judged. There are `read_bytes`\n"
		  "to read and `room` for so many bytes. `complete` ends it, once." },
	{ Py_tp_dealloc, (void *)request_dealloc },
	{ Py_tp_traverse, (void *)request_traverse },
	{ Py_tp_repr, (void *)representation },
	{ Py_tp_methods, request_methods },
	{ Py_tp_getset, request_attributes },
	{ 0, NULL },
};

static PyType_Spec request_spec = {
	.name = "vfiotool.native._types.QueueRequest",
	.basicsize = sizeof(QueueRequest),
	.itemsize = sizeof(struct iovec),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = request_slots,
};

int vt_add_request_type(PyObject *module)
{
	return vt_add_type(module, "QueueRequest", &request_spec);
}

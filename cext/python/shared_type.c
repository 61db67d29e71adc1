/* vfiotool.native._types.SharedCalls: begin and end of a command of a queue pair that threads share.
 *
 * Each is one call without a step of Python's in it, so that no other thread and no signal comes
 * between: the interpreter's lock is all that is needed, and a thread whose time is over leaves
 * nothing behind that others would wait for. Whatever is not plain is left to Python, which takes
 * the TurnLock: a long wait, a full queue, an error, somebody who has that lock (a reset, say).
 * Objects that the garbage collector knows are made before or after the steps that belong together,
 * for it may run Python then.
 *
 * A short wait is here too. One thread looks for all; as soon as another one's command has ended
 * and its own has not, it wakes that one and sleeps in its place: for a batch of commands of a
 * thread there is one switch of threads.
 */
#define _GNU_SOURCE
#include "python/queue_types.h"

#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "vfio/fork.h"

/* So long `end` waits at most: then Python does, who knows of time-outs and the controller's
 * health. */
#define WAIT_NS 2000000u
/* What comes so soon is waited for without letting another thread run: to change threads twice
 * costs as much. */
#define SPIN_NS 20000u
/* Who looked may have gone on to something else than to wait: so late another one looks. */
#define SLEEP_NS 500000

/* A thread that sleeps in `end`. Never given back to the allocator while the object lives: whoever
 * woke it may still be at `open`. */
struct waiter {
	struct waiter *next;
	PyObject *number; /* what it waits for, borrowed */
	uint32_t open;    /* a futex */
};

typedef struct {
	PyObject_HEAD
	QueueCalls *calls;
	TurnLock *lock;
	PyObject *out;        /* number -> SentCommand that is out */
	PyObject *results;    /* number -> SentCommand that has ended */
	PyObject *waiting;    /* thread -> what it waits for */
	PyObject *numbers;    /* an iterator */
	PyObject *health;
	PyObject *completion; /* the class */
	PyObject *tell;       /* called without arguments: settles the rest, and wakes */
	PyObject *names[2];   /* "closed" and "failure", of `health` */
	PyTypeObject *sent, *pins;
	struct waiter *sleeping, *spare;
	unsigned arriving; /* were woken, and have not got the interpreter's lock yet */
	uint64_t generation;
	int leading; /* a thread looks for all, in `lead` */
	int closed;
} SharedCalls;

/* Whether it is this process's queue pair, open, and nobody has the lock. */
static int is_free(const SharedCalls *self)
{
	return !self->closed && !self->lock->times && self->generation == vt_fork_generation;
}

/* Whether `health` knows of nothing: 1, 0, or -1 with an exception set. Its attributes are plain. */
static int is_healthy(const SharedCalls *self)
{
	PyObject *closed = PyObject_GetAttr(self->health, self->names[0]);
	PyObject *failure = closed ? PyObject_GetAttr(self->health, self->names[1]) : NULL;
	int healthy = failure ? closed == Py_False && failure == Py_None : -1;

	Py_XDECREF(closed);
	Py_XDECREF(failure);
	return healthy;
}

/* Whether all of `holds` can be pinned and unpinned by counting alone. */
static int are_plain(const SharedCalls *self, PyObject *holds)
{
	if (!PyTuple_CheckExact(holds))
		return 0;
	for (Py_ssize_t i = 0; i < PyTuple_Size(holds); i++) {
		PyObject *one = PyTuple_GetItem(holds, i);

		if (!PyObject_TypeCheck(one, self->pins) || ((PinCount *)one)->closed)
			return 0;
	}
	return 1;
}

static void count_pins(SentCommand *sent, int by)
{
	for (Py_ssize_t i = 0; i < PyTuple_Size(sent->holds); i++)
		((PinCount *)PyTuple_GetItem(sent->holds, i))->pins += by;
	sent->pinned += by * PyTuple_Size(sent->holds);
}

static int is_plain(const SharedCalls *self, const SentCommand *sent)
{
	return sent->call && !sent->late && sent->ended == Py_None && are_plain(self, sent->holds) &&
	       sent->pinned == PyTuple_Size(sent->holds);
}

/* Ends the command that `done` is of, if it is plain: whether it was. */
static int finish(SharedCalls *self, const struct vt_nvme_done *done)
{
	PyObject *number = PyLong_FromUnsignedLongLong(done->tag);
	PyObject *found = number ? PyDict_GetItemWithError(self->out, number) : NULL;
	SentCommand *sent = (SentCommand *)found;
	int ended = 0;

	if (found && Py_TYPE(found) == self->sent && is_plain(self, sent) &&
	    !PyDict_SetItem(self->results, number, found)) {
		sent->status = done->status;
		sent->result = done->result;
		sent->latency_ns = done->latency_ns;
		count_pins(sent, -1);
		ended = !PyDict_DelItem(self->out, number);
	}
	Py_XDECREF(number);
	PyErr_Clear();
	return ended;
}

/* Takes what has come: 1 if there is something for `tell`, 0 if not, or a negative errno. */
static int look(SharedCalls *self)
{
	struct vt_nvme_done *done = self->calls->done;
	uint32_t at = 0, held;
	int result = self->calls->poll(self->calls->queue, done, self->calls->room, 0, 0,
				       self->calls->held);

	if (result < 0)
		return result;
	held = *self->calls->held;
	while (at < held && finish(self, &done[at]))
		at++;
	memmove(done, done + at, (held - at) * sizeof(*done));
	*self->calls->held = held - at;
	return at < held || (at && PyDict_Size(self->waiting));
}

/* `look`, and `tell` where it is needed: 1, 0 where Python has to see to it, -1 with an exception
 * set. */
static int look_and_tell(SharedCalls *self)
{
	int result = look(self);
	PyObject *answer;

	if (result <= 0)
		return !result;
	answer = PyObject_CallNoArgs(self->tell);
	Py_XDECREF(answer);
	return answer ? 1 : -1;
}

/* Sends the command, with room: its number, a new reference; NULL without an exception where it was
 * not sent. No step of Python's. */
static PyObject *send(SharedCalls *self, SentCommand *sent)
{
	struct vt_nvme_io io = ((QueueCommand *)sent->send)->io;
	PyObject *number = PyIter_Next(self->numbers);

	if (!number)
		return NULL;
	io.tag = PyLong_AsUnsignedLongLong(number);
	if (PyErr_Occurred() || PyDict_SetItem(self->out, number, (PyObject *)sent)) {
		Py_DECREF(number);
		return NULL;
	}
	count_pins(sent, 1);
	if (self->calls->submit(self->calls->queue, &io, 1) == 1)
		return number;
	count_pins(sent, -1);
	PyDict_DelItem(self->out, number);
	Py_DECREF(number);
	return NULL;
}

static PyObject *begin(SharedCalls *self, PyObject *const *arguments, Py_ssize_t count)
{
	PyObject *number = NULL;
	QueueCommand *command;
	SentCommand *sent;
	int able = 1;

	if (count != 2) {
		PyErr_SetString(PyExc_TypeError, "begin takes 2 arguments");
		return NULL;
	}
	command = vt_queue_command(arguments[0]);
	if (!command || command->calls != self->calls || !is_free(self))
		return PyLong_FromLong(0);
	sent = vt_sent_new(self->sent, arguments[0], arguments[1]);
	if (!sent)
		return NULL;
	/* Those whose wait is over wake up while this thread goes on. */
	if (is_free(self) && PyDict_Size(self->waiting))
		able = look_and_tell(self);
	for (int tries = 0; able == 1 && !number && tries < 2; tries++) {
		able = is_free(self) && are_plain(self, sent->holds) ? is_healthy(self) : 0;
		if (able == 1)
			number = send(self, sent);
		if (able == 1 && !number)
			able = PyErr_Occurred() ? -1 : tries ? 0 : look_and_tell(self);
	}
	Py_DECREF((PyObject *)sent);
	if (able < 0)
		return NULL;
	return number ? number : PyLong_FromLong(0);
}

static PyObject *told(const SharedCalls *self, const SentCommand *sent)
{
	newfunc make = (newfunc)PyType_GetSlot(&PyTuple_Type, Py_tp_new);
	PyObject *values = Py_BuildValue("((KHIK))", sent->tag, sent->status, sent->result,
					 sent->latency_ns);
	PyObject *made = values ? make((PyTypeObject *)self->completion, values, NULL) : NULL;

	Py_XDECREF(values);
	return made;
}

static struct waiter *new_waiter(SharedCalls *self, PyObject *number)
{
	struct waiter *made = self->spare;

	if (made)
		self->spare = made->next;
	else
		made = malloc(sizeof(*made));
	if (made)
		made->number = number;
	else
		PyErr_NoMemory();
	return made;
}

static void remove_waiter(SharedCalls *self, const struct waiter *gone)
{
	for (struct waiter **at = &self->sleeping; *at; at = &(*at)->next) {
		if (*at == gone) {
			*at = gone->next;
			return;
		}
	}
}

static void wake(struct waiter *other)
{
	syscall(SYS_futex, &other->open, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Takes the first sleeper whose command has ended, or with `any` the first one, out of the list: to
 * be woken, best without the interpreter's lock, which it wants. */
static struct waiter *open_one(SharedCalls *self, int any)
{
	for (struct waiter *one = self->sleeping; one; one = one->next) {
		if (any || PyDict_Contains(self->results, one->number) == 1) {
			remove_waiter(self, one);
			self->arriving++;
			__atomic_store_n(&one->open, 1, __ATOMIC_RELEASE);
			return one;
		}
	}
	return NULL;
}

/* Sleeps until another thread opens `me`, for a while at most; wakes `other` first. */
static void sleep_for(SharedCalls *self, struct waiter *me, struct waiter *other)
{
	struct timespec time = { 0, SLEEP_NS };

	me->open = 0;
	me->next = self->sleeping;
	self->sleeping = me;
	Py_BEGIN_ALLOW_THREADS
	if (other)
		wake(other);
	syscall(SYS_futex, &me->open, FUTEX_WAIT_PRIVATE, 0, &time, NULL, 0);
	Py_END_ALLOW_THREADS
	if (me->open)
		self->arriving--;
	else
		remove_waiter(self, me);
}

/* Whether there is something to wait for in C. */
static int waits(const SharedCalls *self, PyObject *number, uint64_t until)
{
	return is_free(self) && !PyDict_Contains(self->results, number) && vt_clock_ns() < until;
}

/* Looks for all until `number` has come, or another one's: `*other`, to be woken. As
 * `look_and_tell`. */
static int lead(SharedCalls *self, PyObject *number, uint64_t until, struct waiter **other)
{
	uint64_t since = vt_clock_ns();
	int able = 1;

	self->leading = 1;
	/* Before each look: whoever ran meanwhile may have the lock now, or be another user. */
	while (able == 1 && waits(self, number, until)) {
		able = look_and_tell(self);
		if (able != 1 || PyDict_Contains(self->results, number))
			break;
		*other = open_one(self, 0);
		if (*other)
			break;
		if (vt_clock_ns() - since < SPIN_NS && !self->arriving)
			continue;
		Py_BEGIN_ALLOW_THREADS
		sched_yield();
		Py_END_ALLOW_THREADS
		since = vt_clock_ns();
	}
	self->leading = 0;
	return able;
}

/* Waits for a moment: 0, or -1 with an exception set. */
static int wait_for(SharedCalls *self, PyObject *number)
{
	uint64_t until = vt_clock_ns() + WAIT_NS;
	struct waiter *me = new_waiter(self, number);
	int able = 1;

	if (!me)
		return -1;
	while (able == 1 && waits(self, number, until)) {
		struct waiter *other = NULL;

		if (!self->leading)
			able = lead(self, number, until, &other);
		if (other || self->leading)
			sleep_for(self, me, other);
	}
	me->next = self->spare;
	self->spare = me;
	return able < 0 ? -1 : 0;
}

static PyObject *end(SharedCalls *self, PyObject *const *arguments, Py_ssize_t count)
{
	PyObject *number, *found, *made;

	if (count != 1 && count != 2) {
		PyErr_SetString(PyExc_TypeError, "end takes 1 or 2 arguments");
		return NULL;
	}
	number = arguments[0];
	if (self->generation != vt_fork_generation)
		return Py_NewRef(Py_None);
	found = PyDict_GetItemWithError(self->results, number);
	if (!found && !PyErr_Occurred() && is_free(self)) {
		if (look_and_tell(self) < 0)
			return NULL;
		found = PyDict_GetItemWithError(self->results, number);
		/* A number of another type may be compared by Python: it is not waited for here. */
		if (!found && count == 2 && arguments[1] == Py_True && PyLong_CheckExact(number)) {
			if (wait_for(self, number))
				return NULL;
			found = PyDict_GetItemWithError(self->results, number);
		}
	}
	if (!found)
		return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
	/* Python is about to let go of its buffers, in the lock. */
	if (Py_TYPE(found) != self->sent || ((SentCommand *)found)->pinned)
		return Py_NewRef(Py_None);
	Py_INCREF(found);
	if (PyDict_DelItem(self->results, number)) {
		Py_DECREF(found);
		return NULL;
	}
	made = told(self, (SentCommand *)found);
	Py_DECREF(found);
	return made;
}

static PyObject *shut(SharedCalls *self, PyObject *unused)
{
	struct waiter *one;

	(void)unused;
	self->closed = 1;
	while ((one = open_one(self, 1)))
		wake(one);
	Py_RETURN_NONE;
}

static int shared_init(SharedCalls *self, PyObject *given, PyObject *keywords)
{
	PyObject *calls, *lock, *sent, *pins, *completion;
	PyObject *out, *results, *waiting, *numbers, *health, *tell;

	if (self->calls || (keywords && PyDict_Size(keywords))) {
		PyErr_SetString(PyExc_TypeError, "SharedCalls takes no keyword arguments, once");
		return -1;
	}
	if (!PyArg_ParseTuple(given, "OOOOOO!O!O!OOO", &calls, &lock, &sent, &pins, &completion,
			      &PyDict_Type, &out, &PyDict_Type, &results, &PyDict_Type, &waiting,
			      &numbers, &health, &tell))
		return -1;
	if (!vt_as_queue_calls(calls) || !vt_as_turn_lock(lock) || !vt_as_sent_type(sent) ||
	    !vt_as_pin_type(pins))
		return -1;
	if (!PyType_Check(completion) || !PyIter_Check(numbers) ||
	    !PyType_IsSubtype((PyTypeObject *)completion, &PyTuple_Type)) {
		PyErr_SetString(PyExc_TypeError, "a class of tuples, and an iterator");
		return -1;
	}
	self->names[0] = PyUnicode_InternFromString("closed");
	self->names[1] = PyUnicode_InternFromString("failure");
	if (!self->names[0] || !self->names[1])
		return -1;
	self->generation = vt_fork_generation;
	self->lock = (TurnLock *)Py_NewRef(lock);
	self->sent = (PyTypeObject *)Py_NewRef(sent);
	self->pins = (PyTypeObject *)Py_NewRef(pins);
	self->completion = Py_NewRef(completion);
	self->out = Py_NewRef(out);
	self->results = Py_NewRef(results);
	self->waiting = Py_NewRef(waiting);
	self->numbers = Py_NewRef(numbers);
	self->health = Py_NewRef(health);
	self->tell = Py_NewRef(tell);
	self->calls = (QueueCalls *)Py_NewRef(calls);
	return 0;
}

static int shared_traverse(SharedCalls *self, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE((PyObject *)self));
	Py_VISIT(self->out);
	Py_VISIT(self->results);
	Py_VISIT(self->waiting);
	Py_VISIT(self->numbers);
	Py_VISIT(self->health);
	Py_VISIT(self->completion);
	Py_VISIT(self->tell);
	return 0;
}

/* What leads back to it is the method that `tell` is. */
static int shared_clear(SharedCalls *self)
{
	self->closed = 1;
	Py_CLEAR(self->tell);
	return 0;
}

static void shared_dealloc(SharedCalls *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	struct waiter *spare;

	PyObject_GC_UnTrack(self);
	Py_XDECREF((PyObject *)self->calls);
	Py_XDECREF((PyObject *)self->lock);
	Py_XDECREF((PyObject *)self->sent);
	Py_XDECREF((PyObject *)self->pins);
	Py_XDECREF(self->completion);
	Py_XDECREF(self->out);
	Py_XDECREF(self->results);
	Py_XDECREF(self->waiting);
	Py_XDECREF(self->numbers);
	Py_XDECREF(self->health);
	Py_XDECREF(self->tell);
	Py_XDECREF(self->names[0]);
	Py_XDECREF(self->names[1]);
	while ((spare = self->spare)) {
		self->spare = spare->next;
		free(spare);
	}
	PyObject_GC_Del(self);
	Py_DECREF(type);
}

static PyMethodDef shared_methods[] = {
	{ "begin", (PyCFunction)(void (*)(void))begin, METH_FASTCALL,
	  "begin($self, command, holds, /)\n--\n\n"
	  "Send a QueueCommand that uses the buffers in the tuple `holds`: its number, or 0 where\n"
	  "that takes more than a moment, or is refused: the lock, or another way, tells." },
	{ "end", (PyCFunction)(void (*)(void))end, METH_FASTCALL,
	  "end($self, number, waits=False, /)\n--\n\n"
	  "The completion of a command if it has come, where `waits` is True if it comes within a\n"
	  "moment, once; or None." },
	{ "shut", (PyCFunction)shut, METH_NOARGS, "shut($self, /)\n--\n\nSend and look no more." },
	{ NULL, NULL, 0, NULL },
};

static PyType_Slot shared_slots[] = {
	{ Py_tp_doc,
	  (void *)"SharedCalls(calls, lock, sent, pins, completion, out, results, waiting, numbers,\n"
		  "health, tell)\n--\n\n"
		  "Commands of threads that share a queue pair, where each step is a call: QueueCalls,\n"
		  "the TurnLock, the types SentCommand, PinCount and Completion; dictionaries of what\n"
		  "is out and has ended by number, and of who waits; an iterator of numbers; what has\n"
		  "`closed` and `failure`; and `tell()`, which ends what is not plain, and wakes." },
	{ Py_tp_init, (void *)shared_init },
	{ Py_tp_dealloc, (void *)shared_dealloc },
	{ Py_tp_traverse, (void *)shared_traverse },
	{ Py_tp_clear, (void *)shared_clear },
	{ Py_tp_methods, shared_methods },
	{ 0, NULL },
};

static PyType_Spec shared_spec = {
	.name = "vfiotool.native._types.SharedCalls",
	.basicsize = sizeof(SharedCalls),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.slots = shared_slots,
};

int vt_add_shared_type(PyObject *module)
{
	return vt_add_type(module, "SharedCalls", &shared_spec);
}

/* What the types of an NVMe queue pair share: QueueCalls, QueueCommand, SentCommand, PinCount,
 * TurnLock, SharedCalls. */
#ifndef VT_QUEUE_TYPES_H
#define VT_QUEUE_TYPES_H

#include "python/module.h"

#include "nvme/nvme_queue.h"

typedef int vt_submit_function(struct vt_nvme_queue *, const struct vt_nvme_io *, uint32_t);
typedef int vt_poll_function(struct vt_nvme_queue *, struct vt_nvme_done *, uint32_t, uint32_t,
			     uint64_t, uint32_t *);

typedef struct {
	PyObject_HEAD
	struct vt_nvme_queue *queue;
	vt_submit_function *submit;
	vt_poll_function *poll;
	struct vt_nvme_done *done;
	uint32_t *held;
	uint32_t room;
	PyObject *owners; /* of all that the pointers lead to */
} QueueCalls;

/* A command on blocks, made and not sent; called with a tag it is. */
typedef struct {
	PyObject_HEAD
	QueueCalls *calls;
	PyObject *check; /* called with a negative errno: raises */
	struct vt_nvme_io io;
} QueueCommand;

/* A command that is out, or has ended and was not asked for yet. */
typedef struct {
	PyObject_HEAD
	PyObject *send;  /* sends it, and once more after a reset: QueueCommand or any callable */
	PyObject *holds; /* the buffers that the device may reach, a sequence */
	PyObject *ended; /* None, or called with its completion */
	unsigned long long tag, latency_ns;
	Py_ssize_t pinned; /* how many of `holds` are */
	int place;
	unsigned result;
	unsigned short status;
	char call, late;
} SentCommand;

/* The base of memory that cannot be closed while it is pinned. */
typedef struct {
	PyObject_HEAD
	Py_ssize_t pins;
	char closed;
} PinCount;

typedef struct {
	PyObject_HEAD
	unsigned long owner; /* the thread that has it, where `times` is not 0 */
	unsigned long times;
	unsigned long wanted; /* threads whose patience is over */
} TurnLock;

/* `object` if it is of this type, or is the type: NULL with TypeError set if not. */
QueueCalls *vt_as_queue_calls(PyObject *object);
TurnLock *vt_as_turn_lock(PyObject *object);
PyTypeObject *vt_as_sent_type(PyObject *object);
PyTypeObject *vt_as_pin_type(PyObject *object);

/* `object` if it is a QueueCommand, or NULL. */
QueueCommand *vt_queue_command(PyObject *object);

/* The number in `object`, at most `limit`: 0, or -1 with an exception set. */
int vt_take_number(PyObject *object, uint64_t limit, uint64_t *number);

/* A command of a call that is about to be sent: a new reference, or NULL with an exception set. */
SentCommand *vt_sent_new(PyTypeObject *type, PyObject *send, PyObject *holds);

#endif

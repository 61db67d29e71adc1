/* What the types of a virtqueue that Python serves share: GuestMemory, QueueRequest, DirectQueue. */
#ifndef VT_DIRECT_TYPES_H
#define VT_DIRECT_TYPES_H

#include "python/module.h"

#include "virtio/direct.h"

/* Why DirectQueue._refuse is called. */
#define VT_REQUEST_COMPLETE 1 /* it has ended */
#define VT_REQUEST_WRITTEN 2  /* more bytes than it has room for */
#define VT_QUEUE_THREAD 3     /* the queue is another thread's */
#define VT_QUEUE_STOPPED 4

typedef struct {
	PyObject_HEAD
	struct vt_memory *map; /* the views keep it mapped */
	uint32_t count;
	struct vt_guest_region *regions; /* by address */
} GuestMemory;

typedef struct QueueRequest QueueRequest;

typedef struct {
	PyObject_HEAD
	struct vt_direct *queue; /* NULL: stopped */
	const struct vt_direct_calls *calls;
	unsigned long thread; /* that may call */
	GuestMemory *memory;
	PyTypeObject *requests;  /* the type of requests */
	PyObject *completed;     /* called at each completion, or NULL */
	QueueRequest *in_flight; /* the latest first; the queue has a reference to each */
} DirectQueue;

struct QueueRequest {
	PyObject_VAR_HEAD
	DirectQueue *queue;
	GuestMemory *memory;              /* in which its segments lie */
	PyObject *readable, *writable;    /* lists of views, once they were asked for */
	QueueRequest *before, *after;     /* while it is in flight */
	int is_complete;
	int is_listed;
	struct vt_chain chain;
	struct iovec segments[];
};

/* `object` if it is a GuestMemory: NULL with an exception set if not. */
GuestMemory *vt_as_guest_memory(PyObject *object);

/* A view over `length` bytes at an address that C found to lie in one region: a new reference. */
PyObject *vt_guest_view(const GuestMemory *memory, const struct iovec *segment);

/* `object` if it is the type QueueRequest: NULL with an exception set if not. */
PyTypeObject *vt_as_request_type(PyObject *object);

/* A request of the queue that was just fetched, in flight: a new reference, or NULL with an
 * exception set. */
PyObject *vt_request_new(DirectQueue *queue, const struct vt_chain *chain,
			 const struct iovec *segments);

/* Take a request from those that the queue has in flight. The reference goes. */
void vt_request_leave(QueueRequest *request);

/* Whether this thread may call the queue: 0, or -1 with UsageError set. */
int vt_direct_check_thread(DirectQueue *queue);

/* Calls `_refuse(reason, number, room)` of the queue, which raises; NULL stands for 0. Always
 * NULL. */
PyObject *vt_direct_refuse(DirectQueue *queue, int reason, PyObject *number, unsigned room);

#endif

#include "virtio/worker_state.h"

/* Completions are shown one by one: a driver that is awake on another processor works on them while
 * the next ones are done. One that sleeps is signalled in the middle of a batch and at its end: by the
 * time that it runs there is more than one for it, and more than one left to do here.
 *
 * Sooner while a batch takes long: the first touch of a huge page of a disk in memory costs up to
 * milliseconds, and a driver that waits for 64 of them takes its device for dead. The clock is looked
 * at after so many requests. */
#define LONG_NS 200000u
#define LOOKS 4
/* Batches that are worth a signal in their middle. */
#define HALVED 8
/* How many requests ahead data is fetched; headers, which say where that is, twice as many. */
#define AHEAD 2

/* Make completions visible, and signal them if the driver wants to be. */
static void publish(struct vt_worker *worker, struct vt_queue *queue)
{
	vt_count(&worker->figures.batches);
	if (vt_ring_publish(queue->ring)) {
		vt_count(&worker->figures.signals);
		vt_queue_signal(queue);
	}
	if (vt_ring_broken(queue->ring))
		vt_queue_breaks(queue, vt_ring_broken(queue->ring));
}

static void complete(struct vt_worker *worker, struct vt_queue *queue,
		     const struct vt_memory *memory, const struct vt_chain *chain,
		     const struct iovec *segments, int64_t written)
{
	if (written < 0) {
		vt_queue_breaks(queue, "a request without a header or a status");
		written = 0;
	}
	vt_dirty_chain(&queue->dirty, memory, chain, segments, (uint64_t)written);
	vt_dirty_completion(&queue->dirty, queue->ring);
	vt_ring_complete(queue->ring, chain->head, (uint32_t)written);
	vt_count(&worker->figures.requests);
}

/* Note that a request waits for its disk. */
static void await(struct vt_queue *queue, struct vt_request *request)
{
	request->next = queue->waiting;
	request->link = &queue->waiting;
	if (request->next)
		request->next->link = &request->next;
	queue->waiting = request;
	queue->pending++;
}

/* End a request that waited. */
static void forget(struct vt_queue *queue, struct vt_request *request)
{
	*request->link = request->next;
	if (request->next)
		request->next->link = request->link;
	vt_memory_put(request->memory);
	vt_blk_end(request);
	queue->pending--;
}

/* Whether it has been long since `began`, which is set anew then. */
static bool took_long(uint64_t *began)
{
	uint64_t now = vt_now_ns();

	if (now - *began <= LONG_NS)
		return false;
	*began = now;
	return true;
}

/* Have the processor fetch what later requests of a batch need, while the one at `at` is done. */
static void expect(const struct vt_worker *worker, const struct vt_queue *queue, int at, int got)
{
	const struct vt_chain *chain = &worker->chains[at];

	if (at + 2 * AHEAD < got)
		__builtin_prefetch(worker->arena[chain[2 * AHEAD].first].iov_base);
	if (at + AHEAD < got)
		vt_blk_expect(queue->disk, &chain[AHEAD], worker->arena + chain[AHEAD].first);
}

uint32_t vt_serve(struct vt_worker *worker, struct vt_queue *queue, uint32_t most)
{
	struct vt_blk_means means = { worker->io, queue->port, queue->memory };
	int got = vt_ring_fetch(queue->ring, worker->chains, most, worker->arena, VT_ARENA);
	bool untold = false;
	uint64_t began;

	if (got <= 0) {
		if (got < 0)
			vt_queue_breaks(queue, vt_ring_broken(queue->ring));
		return 0;
	}
	vt_ring_notify_off(queue->ring);
	began = got > LOOKS ? vt_now_ns() : 0;
	for (int i = 0; i < got && !queue->broken; i++) {
		const struct vt_chain *chain = &worker->chains[i];
		const struct iovec *segments = worker->arena + chain->first;
		struct vt_request *request;
		int64_t written;

		expect(worker, queue, i, got);
		written = vt_blk_begin(queue->disk, &queue->mode, chain, segments, &means,
				       &request);
		if (written == -EINPROGRESS) {
			request->queue = queue;
			request->memory = vt_memory_get(queue->memory);
			await(queue, request);
			continue;
		}
		complete(worker, queue, queue->memory, chain, segments, written);
		vt_ring_show(queue->ring);
		untold = true;
		if ((got >= HALVED && i == got / 2 - 1) ||
		    (got > LOOKS && i % LOOKS == LOOKS - 1 && took_long(&began))) {
			publish(worker, queue);
			untold = false;
		}
	}
	if (untold)
		publish(worker, queue);
	return (uint32_t)got;
}

/* Let a queue go whose last request has ended. */
static void leave(struct vt_worker *worker, struct vt_queue *queue)
{
	struct vt_command *command = queue->leaving;

	if (!command || queue->pending)
		return;
	queue->leaving = NULL;
	vt_worker_answer(worker, command, command->run(command));
}

/* Go on with a request whose job has ended; if that was its last, its queue is put into the list. */
static void finish(struct vt_worker *worker, struct vt_request *request, int64_t result,
		   struct vt_queue **finished)
{
	struct vt_queue *queue = request->queue;
	struct vt_blk_means means = { worker->io, queue->port, request->memory };
	int64_t written = vt_blk_continue(request, queue->suspending ? NULL : &means, result);

	if (written == -EINPROGRESS)
		return;
	if (written != -ECANCELED)
		complete(worker, queue, request->memory, &request->chain, request->segments,
			 written);
	forget(queue, request);
	if (!queue->unpublished) {
		queue->unpublished = true;
		queue->next_finished = *finished;
		*finished = queue;
	}
}

static void reap_port(struct vt_worker *worker, struct vt_port *port, struct vt_queue **finished)
{
	int64_t result;
	void *tag;

	/* As many as a queue has commands: others are served as well. */
	for (uint32_t i = 0; i < VT_BATCH && vt_port_reap(port, &tag, &result); i++)
		finish(worker, tag, result, finished);
}

bool vt_serve_finished(struct vt_worker *worker)
{
	struct vt_queue *finished = NULL;
	uint64_t now = vt_now_ns();
	bool any;
	int32_t result;
	void *tag;

	while (worker->io && vt_io_reap(worker->io, &tag, &result))
		finish(worker, tag, result, &finished);
	for (uint32_t i = 0; i < worker->port_count; i++)
		if (vt_port_is_busy(worker->ports[i]))
			reap_port(worker, worker->ports[i], &finished);
	any = finished;
	while (finished) {
		struct vt_queue *queue = finished;

		finished = queue->next_finished;
		queue->unpublished = false;
		publish(worker, queue);
		/* More is likely to come: look, instead of being told. */
		if (queue->window_ns && !queue->parked && !queue->leaving && !queue->broken) {
			queue->worked_at = now;
			vt_queue_wake(queue);
		}
		leave(worker, queue);
	}
	return any;
}

#define _GNU_SOURCE
#include "virtio/direct.h"

#include "virtio/ring_state.h"
#include "virtio/signal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#define ARENA (2u * VT_CHAIN_SEGMENTS)

struct vt_direct {
	struct vt_ring *ring;
	struct vt_memory *memory, *log_memory;
	struct vt_dirty dirty;
	uint32_t size;
	int call_fd;
	struct vt_chain chains[VT_DIRECT_BATCH];
	struct iovec arena[ARENA];
};

static void release(struct vt_direct *queue)
{
	vt_memory_put(queue->memory);
	vt_memory_put(queue->log_memory);
	vt_dirty_end(&queue->dirty);
	if (queue->call_fd >= 0)
		close(queue->call_fd);
	free(queue);
}

static int take_call(struct vt_direct *queue, int call_fd)
{
	int fresh = call_fd < 0 ? -1 : fcntl(call_fd, F_DUPFD_CLOEXEC, 0);

	if (call_fd >= 0 && fresh < 0)
		return -EMFILE;
	/* The driver's end decides whether its eventfd blocks; ours must not. */
	if (fresh >= 0)
		fcntl(fresh, F_SETFL, O_NONBLOCK);
	if (queue->call_fd >= 0)
		close(queue->call_fd);
	queue->call_fd = fresh;
	return 0;
}

static void signal_driver(struct vt_direct *queue)
{
	if (vt_signal(queue->call_fd))
		return;
	close(queue->call_fd);
	queue->call_fd = -1;
	vt_ring_breaks(queue->ring, VT_SIGNAL_BLOCKS);
}

int vt_direct_start(const struct vt_direct_settings *settings, struct vt_direct **queue)
{
	struct vt_direct *made = calloc(1, sizeof(*made));
	int result;

	*queue = NULL;
	if (!made)
		return -ENOMEM;
	made->call_fd = -1;
	made->size = settings->layout.size;
	made->memory = vt_memory_get(settings->memory);
	made->log_memory = settings->log_memory ? vt_memory_get(settings->log_memory) : NULL;
	result = take_call(made, settings->call_fd);
	if (!result)
		result = vt_ring_begin(made->memory, &settings->layout, settings->base,
				       made->log_memory, settings->log_at, &made->ring);
	if (!result)
		result = vt_dirty_set(&made->dirty, &settings->dirty);
	if (result) {
		vt_ring_stop(made->ring);
		release(made);
		return result;
	}
	/* Who served it before may have ended between showing a completion and signalling it. */
	signal_driver(made);
	*queue = made;
	return 0;
}

uint32_t vt_direct_stop(struct vt_direct *queue)
{
	uint32_t base = vt_ring_stop(queue->ring);

	release(queue);
	return base;
}

int vt_direct_fetch(struct vt_direct *queue, uint32_t most, const struct vt_chain **chains,
		    const struct iovec **segments)
{
	*chains = queue->chains;
	*segments = queue->arena;
	return vt_ring_fetch(queue->ring, queue->chains,
			     most < VT_DIRECT_BATCH ? most : VT_DIRECT_BATCH, queue->arena, ARENA);
}

int vt_direct_complete(struct vt_direct *queue, const struct vt_memory *memory,
		       const struct vt_chain *chain, const struct iovec *segments, uint32_t written)
{
	if (chain->head >= queue->size)
		return -EINVAL;
	vt_dirty_chain(&queue->dirty, memory, chain, segments, written);
	vt_dirty_completion(&queue->dirty, queue->ring);
	return vt_ring_complete(queue->ring, chain->head, written);
}

void vt_direct_publish(struct vt_direct *queue)
{
	if (vt_ring_publish(queue->ring))
		signal_driver(queue);
}

bool vt_direct_notify(struct vt_direct *queue, bool on)
{
	if (on)
		return vt_ring_notify_on(queue->ring);
	vt_ring_notify_off(queue->ring);
	return vt_ring_waiting(queue->ring) != 0;
}

uint32_t vt_direct_waiting(const struct vt_direct *queue)
{
	return vt_ring_waiting(queue->ring);
}

uint32_t vt_direct_in_flight(const struct vt_direct *queue)
{
	return vt_ring_in_flight(queue->ring);
}

int vt_direct_set_memory(struct vt_direct *queue, struct vt_memory *memory)
{
	int result = vt_ring_set_memory(queue->ring, memory);

	if (result)
		return result;
	vt_memory_put(queue->memory);
	queue->memory = vt_memory_get(memory);
	return 0;
}

int vt_direct_set_call(struct vt_direct *queue, int call_fd)
{
	int result = take_call(queue, call_fd);

	if (!result)
		signal_driver(queue);
	return result;
}

int vt_direct_set_dirty_log(struct vt_direct *queue, const struct vt_dirty_log *dirty)
{
	return vt_dirty_set(&queue->dirty, dirty);
}

const char *vt_direct_broken(const struct vt_direct *queue)
{
	return vt_ring_broken(queue->ring);
}

const struct vt_direct_calls *vt_direct_calls(void)
{
	static const struct vt_direct_calls calls = {
		.fetch = vt_direct_fetch,
		.complete = vt_direct_complete,
		.publish = vt_direct_publish,
		.notify = vt_direct_notify,
	};

	return &calls;
}

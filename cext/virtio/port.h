/* An NVMe queue pair as one worker's way to disks.
 *
 * Jobs as io.h has them become commands whose data goes between the disk and the guest's memory, by
 * PRP lists, wherever those can tell it (vt_memory_set_io, and the alignment that PRP wants); what they
 * cannot tell goes through a bounce buffer. A job that is more than one command takes is done in part,
 * and says so by its result. What there is no room for waits in order.
 *
 * A port belongs to its worker's thread, but for its figures.
 */
#ifndef VT_VIRTIO_PORT_H
#define VT_VIRTIO_PORT_H

#include <stdbool.h>
#include <stdint.h>

#include "nvme/nvme_queue.h"
#include "virtio/io.h"
#include "virtio/memory.h"

struct vt_port;

/* Where on a controller a disk is. */
struct vt_port_place {
	uint32_t nsid;
	uint32_t block_bytes;  /* of the namespace, a power of two; 0: the disk is not on a controller */
	bool trims, zeroes;    /* it has Dataset Management, Write Zeroes */
};

struct vt_port_settings {
	struct vt_nvme_queue *queue; /* nobody else sends there; stays until vt_port_close */
	uint64_t controller;         /* any number: ports of the same one stand for each other */
	uint64_t bounce, bounce_io;  /* `bounces` pieces of `bounce_bytes`, whole pages each */
	uint32_t bounces, bounce_bytes;
	uint32_t page_size, max_transfer;
	int event_fd;                /* eventfd that completions signal; -1: the port is polled */
};

struct vt_port_figures {
	uint64_t commands, bounced, bounced_bytes;
	uint64_t progressed_ns;      /* when something ended, or the first of those out was begun */
	uint64_t in_flight;          /* commands out, and jobs that wait */
};

/* Make a port. Return: 0, -EINVAL, -ENOMEM, -EMFILE. */
int vt_port_open(const struct vt_port_settings *settings, struct vt_port **port);

/* Close a port that no worker has. `port` may be NULL. */
void vt_port_close(struct vt_port *port);

/* Begin a job: job->fd is not looked at, job->flags is RWF_DSYNC or 0, or FALLOC_FL_*; VT_IO_ALLOCATE
 * with flags 0 says that the disk need not keep a range. It starts no later than vt_port_tell.
 * Return: -EINPROGRESS, or why it cannot be done. */
int64_t vt_port_begin(struct vt_port *port, const struct vt_port_place *place,
		      const struct vt_io_job *job, const struct vt_memory *memory, void *tag);

/* Tell the controller of what was begun. */
void vt_port_tell(struct vt_port *port);

/* Take one job that has ended. Return: whether there was one; `result` is the bytes that were moved,
 * 0 for other jobs, or a negative errno. */
bool vt_port_reap(struct vt_port *port, void **tag, int64_t *result);

/* Whether something is out that has to be waited for. */
bool vt_port_is_busy(const struct vt_port *port);

/* The controller is about to be reset: nothing more is sent or taken, what comes meanwhile waits. */
void vt_port_down(struct vt_port *port);

/* After that: with `works` what was out is sent once more, but for what was sent twice already;
 * otherwise all ends with -EIO, and so does what is begun until the port is up. */
void vt_port_up(struct vt_port *port, bool works);

int vt_port_event(const struct vt_port *port);
uint64_t vt_port_controller(const struct vt_port *port);
void vt_port_figures(const struct vt_port *port, struct vt_port_figures *figures);

#endif

#define _GNU_SOURCE
#include "virtio/port.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"

/* NVM Command Set Specification 1.0, section 3.2. */
#define OP_FLUSH 0x00u
#define OP_WRITE 0x01u
#define OP_READ 0x02u
#define OP_WRITE_ZEROES 0x08u
#define OP_DATASET 0x09u
#define FUA 0x4000u         /* in the upper half of command dword 12 */
#define DEALLOCATE 0x0200u
#define ATTRIBUTE_DEALLOCATE 4u
#define MOST_BLOCKS 65536u
#define INVALID_OPCODE 1u
#define INVALID_FIELD 2u
#define STATUS 0x7ffu
#define COMMAND_BYTES 64u

/* A page of PRP entries, and the first one, which stands in the command. */
#define ENTRIES 513u
#define DONE 64u
#define NONE UINT32_MAX

struct pending {
	struct vt_io_job job;
	struct vt_port_place place;
	const struct vt_memory *memory;
	void *tag;
	int64_t result;   /* of one that has ended; the bytes of one that is out */
	uint32_t tries;
};

/* First in, first out. */
struct line {
	struct pending *items;
	uint32_t room, first, count;
};

struct command_out {
	struct pending pending;
	uint32_t bounce;
	bool active;
};

struct vt_port {
	struct vt_port_settings settings;
	struct vt_port_figures figures;
	struct command_out *out;
	uint32_t depth;
	uint32_t *free, free_count;      /* indices into `out` */
	uint32_t *bounces, bounce_count; /* that are free */
	struct line waiting, ended;
	bool untold, down, dead;
	struct vt_nvme_done done[DONE];
	uint32_t done_count, done_next;
	uint64_t entries[ENTRIES];
};

static void add(uint64_t *counter, uint64_t by)
{
	__atomic_store_n(counter, *counter + by, __ATOMIC_RELAXED);
}

static void progressed(struct vt_port *port)
{
	__atomic_store_n(&port->figures.progressed_ns, vt_clock_ns(), __ATOMIC_RELAXED);
}

static void count_out(struct vt_port *port)
{
	__atomic_store_n(&port->figures.in_flight,
			 (uint64_t)(port->depth - port->free_count) + port->waiting.count +
				 port->ended.count,
			 __ATOMIC_RELAXED);
}

static bool push(struct line *line, const struct pending *item)
{
	if (line->count == line->room) {
		uint32_t room = line->room ? 2 * line->room : 64;
		struct pending *items = malloc(room * sizeof(*items));

		if (!items)
			return false;
		for (uint32_t i = 0; i < line->count; i++)
			items[i] = line->items[(line->first + i) % line->room];
		free(line->items);
		line->items = items;
		line->room = room;
		line->first = 0;
	}
	line->items[(line->first + line->count++) % line->room] = *item;
	return true;
}

static void pop(struct line *line)
{
	line->first = (line->first + 1) % line->room;
	line->count--;
}

int vt_port_open(const struct vt_port_settings *settings, struct vt_port **port)
{
	struct vt_nvme_counters counters;
	struct vt_port *made;
	uint32_t page = settings->page_size;
	bool deaf;

	*port = NULL;
	if (page < 4096 || page & (page - 1) || settings->bounce_bytes < page ||
	    settings->bounce_bytes % page || !settings->bounces || settings->bounce % page ||
	    settings->bounce_io % page || settings->max_transfer < page)
		return -EINVAL;
	made = calloc(1, sizeof(*made));
	if (!made)
		return -ENOMEM;
	made->settings = *settings;
	vt_nvme_count(settings->queue, &counters);
	made->depth = made->free_count = counters.depth;
	made->bounce_count = settings->bounces;
	made->out = calloc(made->depth, sizeof(*made->out));
	made->free = calloc(made->depth, sizeof(*made->free));
	made->bounces = calloc(settings->bounces, sizeof(*made->bounces));
	made->settings.event_fd =
		settings->event_fd < 0 ? -1 : fcntl(settings->event_fd, F_DUPFD_CLOEXEC, 0);
	deaf = settings->event_fd >= 0 && made->settings.event_fd < 0;
	if (deaf || !made->out || !made->free || !made->bounces) {
		vt_port_close(made);
		return deaf ? -EMFILE : -ENOMEM;
	}
	for (uint32_t i = 0; i < made->depth; i++)
		made->free[i] = made->depth - 1 - i;
	for (uint32_t i = 0; i < settings->bounces; i++)
		made->bounces[i] = i;
	*port = made;
	return 0;
}

void vt_port_close(struct vt_port *port)
{
	if (!port)
		return;
	if (port->settings.event_fd >= 0)
		close(port->settings.event_fd);
	free(port->waiting.items);
	free(port->ended.items);
	free(port->out);
	free(port->free);
	free(port->bounces);
	free(port);
}

static uint64_t bytes_of(const struct vt_io_job *job)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < job->segment_count; i++)
		bytes += job->segments[i].iov_len;
	return bytes;
}

/* The PRP entries of as much of a job's data as one command can tell. Return: those bytes. */
static uint64_t tell_pages(struct vt_port *port, const struct pending *pending, uint64_t most)
{
	const struct vt_io_job *job = &pending->job;
	uint64_t page = port->settings.page_size, bytes = 0, end = 0;
	uint32_t count = 0;

	for (uint32_t i = 0; i < job->segment_count && bytes < most; i++) {
		uint64_t length = job->segments[i].iov_len, left;
		uint64_t io = vt_memory_io(pending->memory, job->segments[i].iov_base, &left);

		/* Section 4.1.1: within a command pages follow each other but for its two ends. */
		if (io == UINT64_MAX || left < length || io % 4 || (i && (io | end) % page))
			break;
		if (length > most - bytes)
			length = most - bytes;
		end = io + length;
		for (; io < end && count < ENTRIES; io += page - io % page)
			port->entries[count++] = io;
		if (io < end)
			return bytes + length - (end - io);
		bytes += length;
	}
	return bytes;
}

/* Copy between a bounce buffer and the first `bytes` of a job's data. */
static void copy(const struct vt_io_job *job, uint8_t *bounce, uint64_t bytes, bool in)
{
	for (uint32_t i = 0; i < job->segment_count && bytes; i++) {
		size_t piece = job->segments[i].iov_len;

		if (piece > bytes)
			piece = (size_t)bytes;
		if (in)
			memcpy(bounce, job->segments[i].iov_base, piece);
		else
			memcpy(job->segments[i].iov_base, bounce, piece);
		bounce += piece;
		bytes -= piece;
	}
}

static uint8_t *bounce_at(struct vt_port *port, uint32_t bounce)
{
	return (uint8_t *)(uintptr_t)port->settings.bounce +
	       (size_t)bounce * port->settings.bounce_bytes;
}

/* The entries of a bounce buffer. */
static void tell_bounce(struct vt_port *port, uint32_t bounce, uint64_t bytes)
{
	uint64_t page = port->settings.page_size;
	uint64_t io = port->settings.bounce_io + (uint64_t)bounce * port->settings.bounce_bytes;

	for (uint64_t at = 0; at < bytes; at += page)
		port->entries[at / page] = io + at;
}

static uint64_t smaller(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* How a read's or a write's data is told. Return: 0 with the command's bytes in pending->result and
 * the bounce buffer or NONE; -EAGAIN without one; -EIO for what is no whole blocks. */
static int tell_data(struct vt_port *port, struct pending *pending, uint32_t *bounce)
{
	const struct vt_io_job *job = &pending->job;
	uint64_t block = pending->place.block_bytes, all = bytes_of(job), bytes;
	uint64_t most = smaller(all, smaller(port->settings.max_transfer,
					     (uint64_t)MOST_BLOCKS * block));

	if (!all || (all | job->offset) % block)
		return -EIO;
	bytes = tell_pages(port, pending, most);
	bytes -= bytes % block;
	/* A copy is better than a command for each small piece. */
	if (bytes == most - most % block || bytes >= port->settings.page_size) {
		pending->result = (int64_t)bytes;
		return 0;
	}
	if (!port->bounce_count)
		return -EAGAIN;
	bytes = smaller(most, port->settings.bounce_bytes);
	bytes -= bytes % block;
	pending->result = (int64_t)bytes;
	*bounce = port->bounces[--port->bounce_count];
	tell_bounce(port, *bounce, bytes);
	if (job->kind == VT_IO_WRITE)
		copy(job, bounce_at(port, *bounce), bytes, true);
	add(&port->figures.bounced, 1);
	add(&port->figures.bounced_bytes, bytes);
	return 0;
}

/* Section 3.2.3: one range of 16 bytes: attributes, blocks, first block. */
static int tell_trim(struct vt_port *port, const struct pending *pending, uint32_t *bounce)
{
	const struct vt_io_job *job = &pending->job;
	uint64_t block = pending->place.block_bytes;
	uint32_t blocks = htole32((uint32_t)(job->length / block));
	uint64_t lba = htole64(job->offset / block);
	uint8_t *range;

	if (job->length / block > UINT32_MAX)
		return -EOPNOTSUPP;
	if (!port->bounce_count)
		return -EAGAIN;
	*bounce = port->bounces[--port->bounce_count];
	range = bounce_at(port, *bounce);
	memset(range, 0, 16);
	memcpy(range + 4, &blocks, sizeof(blocks));
	memcpy(range + 8, &lba, sizeof(lba));
	tell_bounce(port, *bounce, 16);
	return 0;
}

static int make_range(struct vt_port *port, struct pending *pending, struct vt_nvme_io *io,
		      uint32_t *bounce)
{
	const struct vt_io_job *job = &pending->job;
	uint64_t block = pending->place.block_bytes;

	pending->result = 0;
	if ((job->offset | job->length) % block)
		return -EINVAL;
	if (!job->flags) {
		io->opcode = OP_DATASET;
		return pending->place.trims ? tell_trim(port, pending, bounce) : -EOPNOTSUPP;
	}
	if (!pending->place.zeroes || job->length / block > MOST_BLOCKS)
		return -EOPNOTSUPP;
	io->opcode = OP_WRITE_ZEROES;
	io->lba = job->offset / block;
	io->blocks = (uint32_t)(job->length / block);
	io->control = job->flags & FALLOC_FL_PUNCH_HOLE ? DEALLOCATE : 0;
	return 0;
}

static int make(struct vt_port *port, struct pending *pending, struct vt_nvme_io *io,
		uint32_t *bounce)
{
	const struct vt_io_job *job = &pending->job;
	int result = 0;

	*io = (struct vt_nvme_io){ .nsid = pending->place.nsid };
	switch (job->kind) {
	case VT_IO_READ:
	case VT_IO_WRITE:
		result = tell_data(port, pending, bounce);
		io->opcode = job->kind == VT_IO_READ ? OP_READ : OP_WRITE;
		io->control = job->flags && job->kind == VT_IO_WRITE ? FUA : 0;
		io->lba = job->offset / pending->place.block_bytes;
		io->bytes = (uint32_t)pending->result;
		io->blocks = io->bytes / pending->place.block_bytes;
		break;
	case VT_IO_SYNC:
		io->opcode = OP_FLUSH;
		pending->result = 0;
		break;
	case VT_IO_ALLOCATE:
		result = make_range(port, pending, io, bounce);
		break;
	}
	return result;
}

/* Dataset Management has its number of ranges where others have a block: it is made by hand. */
static int put_trim(struct vt_port *port, const struct vt_nvme_io *io)
{
	uint32_t command[COMMAND_BYTES / 4] = { htole32(OP_DATASET), htole32(io->nsid) };
	uint64_t prp1 = htole64(port->entries[0]);

	memcpy(&command[6], &prp1, sizeof(prp1));
	command[11] = htole32(ATTRIBUTE_DEALLOCATE);
	return vt_nvme_submit_raw(port->settings.queue, command, io->tag);
}

/* Send a job. Return: 0, -EAGAIN if there is no room now, or why it cannot be done. */
static int send(struct vt_port *port, struct pending *pending)
{
	uint32_t bounce = NONE, index;
	struct vt_nvme_io io;
	int result;

	if (!port->free_count)
		return -EAGAIN;
	result = make(port, pending, &io, &bounce);
	if (result)
		return result;
	index = port->free[port->free_count - 1];
	io.tag = index;
	result = io.opcode == OP_DATASET ? put_trim(port, &io) :
					   vt_nvme_put(port->settings.queue, &io, port->entries);
	if (result != 1) {
		if (bounce != NONE)
			port->bounces[port->bounce_count++] = bounce;
		/* A queue that was stopped is about to be reset: that is when this is tried again. */
		return result == 0 || result == -ESHUTDOWN || result == -EACCES ? -EAGAIN : -EIO;
	}
	if (port->free_count == port->depth)
		progressed(port);
	port->free_count--;
	port->out[index] = (struct command_out){ *pending, bounce, true };
	port->untold = true;
	add(&port->figures.commands, 1);
	return 0;
}

int64_t vt_port_begin(struct vt_port *port, const struct vt_port_place *place,
		      const struct vt_io_job *job, const struct vt_memory *memory, void *tag)
{
	struct pending pending = { .job = *job, .place = *place, .memory = memory, .tag = tag };
	int result = port->dead ? -EIO : -EAGAIN;

	if (!port->dead && !port->down && !port->waiting.count)
		result = send(port, &pending);
	if (result == -EAGAIN && push(&port->waiting, &pending))
		result = 0;
	count_out(port);
	return result ? result : -EINPROGRESS;
}

static void end(struct vt_port *port, struct pending *pending, int64_t result)
{
	pending->result = result;
	/* Without memory for a note of it nobody would ever hear of it again. */
	if (!push(&port->ended, pending))
		abort();
}

/* Send what waited for room. */
static void send_waiting(struct vt_port *port)
{
	while (port->waiting.count && !port->down) {
		struct pending *next = &port->waiting.items[port->waiting.first];
		int result = send(port, next);

		if (result == -EAGAIN)
			return;
		if (result)
			end(port, next, result);
		pop(&port->waiting);
	}
}

void vt_port_tell(struct vt_port *port)
{
	if (port->waiting.count)
		send_waiting(port);
	if (port->untold && !port->down && !vt_nvme_tell(port->settings.queue))
		port->untold = false;
}

static int64_t result_of(const struct pending *pending, uint16_t status)
{
	uint32_t code = status & STATUS;

	if (!code)
		return pending->result;
	if (pending->job.kind == VT_IO_ALLOCATE &&
	    (code == INVALID_OPCODE || code == INVALID_FIELD))
		return -EOPNOTSUPP;
	return -EIO;
}

/* Give back what a command used. */
static void release(struct vt_port *port, uint32_t index)
{
	struct command_out *out = &port->out[index];

	if (out->bounce != NONE)
		port->bounces[port->bounce_count++] = out->bounce;
	out->active = false;
	port->free[port->free_count++] = index;
}

static bool take(struct vt_port *port, void **tag, int64_t *result)
{
	while (port->done_next < port->done_count) {
		const struct vt_nvme_done *done = &port->done[port->done_next++];
		struct command_out *out = &port->out[done->tag < port->depth ? done->tag : 0];

		if (done->tag >= port->depth || !out->active)
			continue;
		*tag = out->pending.tag;
		*result = result_of(&out->pending, done->status);
		if (*result > 0 && out->bounce != NONE && out->pending.job.kind == VT_IO_READ)
			copy(&out->pending.job, bounce_at(port, out->bounce), (uint64_t)*result,
			     false);
		release(port, (uint32_t)done->tag);
		return true;
	}
	return false;
}

static void look(struct vt_port *port)
{
	uint32_t held = 0;

	if (port->down || port->free_count == port->depth)
		return;
	vt_nvme_poll(port->settings.queue, port->done, DONE, 0, 0, &held);
	port->done_next = 0;
	port->done_count = held;
	if (held)
		progressed(port);
}

bool vt_port_reap(struct vt_port *port, void **tag, int64_t *result)
{
	bool found = take(port, tag, result);

	if (!found) {
		look(port);
		found = take(port, tag, result);
	}
	if (!found && port->ended.count) {
		const struct pending *first = &port->ended.items[port->ended.first];

		*tag = first->tag;
		*result = first->result;
		pop(&port->ended);
		found = true;
	}
	if (!found && port->waiting.count)
		send_waiting(port);
	count_out(port);
	return found;
}

bool vt_port_is_busy(const struct vt_port *port)
{
	return port->free_count != port->depth || port->ended.count || port->waiting.count;
}

void vt_port_down(struct vt_port *port)
{
	/* What was taken already has ended. */
	port->down = true;
}

void vt_port_up(struct vt_port *port, bool works)
{
	struct line before = port->waiting;

	port->waiting = (struct line){ 0 };
	for (uint32_t i = 0; i < port->depth; i++) {
		struct pending *pending = &port->out[i].pending;

		if (!port->out[i].active)
			continue;
		if (!works || pending->tries++ || !push(&port->waiting, pending))
			end(port, pending, -EIO);
		release(port, i);
	}
	port->done_next = port->done_count = 0;
	for (; before.count; pop(&before)) {
		struct pending *pending = &before.items[before.first];

		if (!works || !push(&port->waiting, pending))
			end(port, pending, -EIO);
	}
	free(before.items);
	port->untold = false;
	port->dead = !works;
	port->down = !works;
	progressed(port);
	count_out(port);
}

int vt_port_event(const struct vt_port *port)
{
	return port->settings.event_fd;
}

uint64_t vt_port_controller(const struct vt_port *port)
{
	return port->settings.controller;
}

void vt_port_figures(const struct vt_port *port, struct vt_port_figures *figures)
{
	const uint64_t *from = (const uint64_t *)&port->figures;
	uint64_t *to = (uint64_t *)figures;

	for (size_t i = 0; i < sizeof(*figures) / sizeof(uint64_t); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

#define _GNU_SOURCE
#include "virtio/disk.h"
#include "virtio/ram.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define T_IN 0u
#define T_OUT 1u
#define T_FLUSH 4u
#define T_GET_ID 8u
#define T_DISCARD 11u
#define T_WRITE_ZEROES 13u

#define S_OK 0u
#define S_IOERR 1u
#define S_UNSUPP 2u

#define RANGE_UNMAP 1u

struct header {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

struct range {
	uint64_t sector;
	uint32_t sectors;
	uint32_t flags;
};

_Static_assert(sizeof(struct header) == 16 && sizeof(struct range) == 16, "section 5.2.6");

/* A place in a chain's segments, for reading it as a stream of bytes. */
struct cursor {
	const struct iovec *segments;
	uint32_t count, index;
	size_t inside;
};

static void count(uint64_t *counter, uint64_t by)
{
	__atomic_add_fetch(counter, by, __ATOMIC_RELAXED);
}

/* Copy the next `length` bytes out of a chain. Return: whether there were as many. */
static bool take(struct cursor *cursor, void *data, size_t length)
{
	uint8_t *to = data;

	while (length) {
		size_t piece;

		if (cursor->index == cursor->count)
			return false;
		piece = cursor->segments[cursor->index].iov_len - cursor->inside;
		if (piece > length)
			piece = length;
		memcpy(to, (uint8_t *)cursor->segments[cursor->index].iov_base + cursor->inside,
		       piece);
		to += piece;
		length -= piece;
		cursor->inside += piece;
		if (cursor->inside == cursor->segments[cursor->index].iov_len) {
			cursor->index++;
			cursor->inside = 0;
		}
	}
	return true;
}

/* Copy `length` bytes into a chain's writable segments from their beginning. */
static void put(const struct iovec *segments, uint32_t segment_count, const void *data,
		size_t length)
{
	const uint8_t *from = data;

	for (uint32_t i = 0; i < segment_count && length; i++) {
		size_t piece = segments[i].iov_len < length ? segments[i].iov_len : length;

		memcpy(segments[i].iov_base, from, piece);
		from += piece;
		length -= piece;
	}
}

/* The segments from a cursor on, cut to `length` bytes. Return: their number. */
static uint32_t rest(const struct cursor *cursor, uint64_t length, struct iovec *cut)
{
	uint32_t made = 0;
	size_t inside = cursor->inside;

	for (uint32_t i = cursor->index; i < cursor->count && length; i++) {
		size_t piece = cursor->segments[i].iov_len - inside;

		if (piece > length)
			piece = (size_t)length;
		cut[made++] = (struct iovec){ (uint8_t *)cursor->segments[i].iov_base + inside,
					      piece };
		length -= piece;
		inside = 0;
	}
	return made;
}

/* Whether `sectors` from `sector` on lie on the disk. */
static bool lies_within(const struct vt_disk *disk, uint64_t sector, uint64_t sectors)
{
	uint64_t all = __atomic_load_n(&disk->size, __ATOMIC_ACQUIRE) / VT_SECTOR;

	return sector <= all && sectors <= all - sector;
}

/* What is left of a request: one job after another, until none is left or one has failed. */
struct vt_blk_work {
	struct vt_disk *disk;
	uint8_t *status;      /* where the answer goes */
	int64_t written;      /* bytes to report */
	uint64_t bytes;       /* of data */
	uint8_t answer;
	uint32_t type;
	bool stable;          /* is on the disk when it is answered */
	bool synced;
	uint32_t tries;       /* of a job that was interrupted */
	struct iovec *data;   /* not moved yet */
	uint32_t data_count;
	uint64_t at;          /* on the disk, of the next byte */
	struct iovec own[1];  /* zeros to write */
	uint32_t range, range_count;
	bool by_hand;         /* the range is overwritten, since the file cannot be told */
	struct range ranges[VT_BLK_RANGES];
};

#define TRIES 64u
static uint8_t zeros[1 << 16];

static bool is_aligned(const struct vt_disk *disk, const struct vt_blk_work *work, uint64_t at)
{
	uint64_t all = at;

	for (uint32_t i = 0; i < work->data_count; i++)
		all |= (uintptr_t)work->data[i].iov_base | work->data[i].iov_len;
	return !(all & (disk->alignment - 1));
}

static void transfer_job(const struct vt_blk_work *work, struct vt_io_job *job)
{
	const struct vt_disk *disk = work->disk;
	uint64_t at = disk->offset + work->at;
	bool direct = disk->direct_fd >= 0 && is_aligned(disk, work, at);

	*job = (struct vt_io_job){
		.kind = work->type == T_IN ? VT_IO_READ : VT_IO_WRITE,
		.fd = direct ? disk->direct_fd : disk->fd,
		.flags = work->stable ? RWF_DSYNC : 0,
		.segments = work->data,
		.segment_count = work->data_count,
		.offset = at,
	};
}

static void range_job(struct vt_blk_work *work, struct vt_io_job *job)
{
	const struct range *range = &work->ranges[work->range];
	bool unmap = work->type == T_DISCARD || range->flags & RANGE_UNMAP;
	uint64_t length = (uint64_t)range->sectors * VT_SECTOR;

	*job = (struct vt_io_job){ .fd = work->disk->fd,
				   .offset = work->disk->offset + range->sector * VT_SECTOR };
	if (work->by_hand) {
		work->own[0] = (struct iovec){ zeros, length < sizeof(zeros) ? (size_t)length :
									       sizeof(zeros) };
		job->kind = VT_IO_WRITE;
		job->segments = work->own;
		job->segment_count = 1;
		return;
	}
	job->kind = VT_IO_ALLOCATE;
	job->length = length;
	/* A controller is told that a range is not needed, which promises no zeros. */
	if (work->disk->place.block_bytes && work->type == T_DISCARD)
		return;
	job->flags = FALLOC_FL_KEEP_SIZE | (unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
}

static bool next_piece(struct vt_blk_work *work, struct vt_io_job *job)
{
	if (work->answer != S_OK)
		return false;
	switch (work->type) {
	case T_IN:
	case T_OUT:
		if (!work->data_count)
			return false;
		transfer_job(work, job);
		return true;
	case T_DISCARD:
	case T_WRITE_ZEROES:
		while (work->range < work->range_count && !work->ranges[work->range].sectors)
			work->range++;
		if (work->range < work->range_count) {
			range_job(work, job);
			return true;
		}
		if (!work->stable)
			return false;
		break;
	default:
		break;
	}
	*job = (struct vt_io_job){ .kind = VT_IO_SYNC, .fd = work->disk->fd };
	return !work->synced;
}

/* Return: whether there is another job. */
static bool next_job(struct vt_blk_work *work, struct vt_io_job *job)
{
	if (!next_piece(work, job))
		return false;
	job->elsewhere = work->disk->holds;
	return true;
}

/* So many bytes were moved. */
static void moved(struct vt_blk_work *work, size_t bytes)
{
	work->at += bytes;
	while (work->data_count && bytes >= work->data->iov_len) {
		bytes -= work->data->iov_len;
		work->data++;
		work->data_count--;
	}
	if (bytes) {
		work->data->iov_base = (uint8_t *)work->data->iov_base + bytes;
		work->data->iov_len -= bytes;
	}
}

static void range_done(struct vt_blk_work *work, int64_t result)
{
	struct range *range = &work->ranges[work->range];

	if (work->by_hand && result > 0) {
		/* Files on odd file systems may take less than was given: whole sectors count. */
		range->sector += (uint64_t)result / VT_SECTOR;
		range->sectors -= (uint32_t)(result / VT_SECTOR);
		work->by_hand = range->sectors;
		if (result < (int64_t)VT_SECTOR)
			work->answer = S_IOERR;
	} else if (!work->by_hand && !result) {
		range->sectors = 0;
	} else if (!work->by_hand &&
		   (result == -EOPNOTSUPP || result == -ENODEV || result == -EINVAL)) {
		/* A discard is a hint; zeros are a promise. */
		if (work->type == T_DISCARD)
			range->sectors = 0;
		else
			work->by_hand = true;
	} else {
		work->answer = S_IOERR;
	}
}

static void take_result(struct vt_blk_work *work, const struct vt_io_job *job, int64_t result)
{
	if ((result == -EINTR || result == -EAGAIN) && work->tries++ < TRIES)
		return;
	if (job->kind == VT_IO_SYNC) {
		work->synced = true;
		if (result)
			work->answer = S_IOERR;
	} else if (work->type == T_DISCARD || work->type == T_WRITE_ZEROES) {
		range_done(work, result);
	} else if (result <= 0) {
		work->answer = S_IOERR;
	} else {
		moved(work, (size_t)result);
	}
}

static int64_t answered(struct vt_blk_work *work)
{
	struct vt_disk_figures *figures = &work->disk->figures;

	if (work->answer != S_OK)
		count(&figures->failed, 1);
	else if (work->bytes)
		count(work->type == T_IN ? &figures->bytes_read : &figures->bytes_written,
		      work->bytes);
	*(volatile uint8_t *)work->status = work->answer;
	return work->written;
}

/* Do all that is left at once. */
static int64_t finish(struct vt_blk_work *work)
{
	struct vt_io_job job;

	while (next_job(work, &job))
		take_result(work, &job, vt_io_do(&job));
	return answered(work);
}

/* Move what can be moved without waiting for a disk. */
static void try_now(struct vt_blk_work *work)
{
	struct vt_disk *disk = work->disk;
	bool write = work->type == T_OUT;
	struct vt_io_job job;
	int64_t result;

	if ((work->type != T_IN && !write) || work->stable || disk->direct_fd >= 0 ||
	    disk->holds ||
	    __atomic_load_n(&disk->no_nowait[write], __ATOMIC_RELAXED) || !next_job(work, &job))
		return;
	job.flags |= RWF_NOWAIT;
	result = vt_io_do(&job);
	if (result > 0)
		moved(work, (size_t)result);
	else if (result == -EOPNOTSUPP || result == -EINVAL)
		__atomic_store_n(&disk->no_nowait[write], 1, __ATOMIC_RELAXED);
}

/* Keep a request for as long as its jobs take. Return: it, or NULL. */
static struct vt_request *kept(const struct vt_blk_work *work, const struct vt_chain *chain,
			       const struct iovec *segments)
{
	size_t count = (size_t)chain->readable + chain->writable, room = sizeof(struct vt_blk_work);
	struct vt_request *made;
	struct iovec *copies;

	/* What is never looked at is left out. */
	if (!work->range_count)
		room = offsetof(struct vt_blk_work, ranges);
	room = (room + 15) & ~(size_t)15;
	made = malloc(sizeof(*made) + room + (count + work->data_count) * sizeof(*segments));
	if (!made)
		return NULL;
	made->work = (struct vt_blk_work *)(void *)(made + 1);
	copies = (struct iovec *)(void *)((uint8_t *)made->work + room);
	memcpy(made->work, work, work->range_count ? sizeof(*work) :
						     offsetof(struct vt_blk_work, ranges));
	memcpy(copies, segments, count * sizeof(*segments));
	if (work->data_count)
		memcpy(copies + count, work->data, work->data_count * sizeof(*segments));
	made->segments = copies;
	made->work->data = copies + count;
	made->chain = *chain;
	made->chain.first = 0;
	return made;
}

void vt_blk_end(struct vt_request *request)
{
	free(request);
}

/* Begin a job where the disk is. Return: -EINPROGRESS; -EAGAIN if the ring has no room, so that it
 * is done at once; or the job's result, which is an error. */
static int64_t begin_job(const struct vt_disk *disk, const struct vt_blk_means *means,
			 const struct vt_io_job *job, struct vt_request *request)
{
	if (disk->place.block_bytes)
		return means->port ? vt_port_begin(means->port, &disk->place, job, means->memory,
						   request) :
				     -EIO;
	return means->io && vt_io_begin(means->io, job, request) ? -EINPROGRESS : -EAGAIN;
}

/* Begin the next job, or answer when none is left. */
static int64_t carry_on(struct vt_request *request, const struct vt_blk_means *means)
{
	struct vt_blk_work *work = request->work;
	struct vt_io_job job;
	int64_t result;

	while (next_job(work, &job)) {
		if (!means)
			return -ECANCELED;
		result = begin_job(work->disk, means, &job, request);
		if (result == -EINPROGRESS)
			return result;
		take_result(work, &job, result == -EAGAIN ? vt_io_do(&job) : result);
	}
	return answered(work);
}

int64_t vt_blk_continue(struct vt_request *request, const struct vt_blk_means *means,
			int64_t result)
{
	struct vt_blk_work *work = request->work;
	struct vt_io_job job;

	/* The job is the one that next_job named last: nothing has changed since. */
	if (next_job(work, &job)) {
		if (!means && (result == -ECANCELED || result == -EINTR || result == -EAGAIN))
			return -ECANCELED;
		take_result(work, &job, result);
	}
	return carry_on(request, means);
}

/* Begin what is left by the thread's means, or finish it here. */
static int64_t begin(struct vt_blk_work *work, const struct vt_chain *chain,
		     const struct iovec *segments, const struct vt_blk_means *means,
		     struct vt_request **request)
{
	bool is_file = !work->disk->place.block_bytes;
	struct vt_request *made;
	struct vt_io_job job;
	int64_t result;

	if (is_file && (!means->io || work->disk->quick || !next_job(work, &job)))
		return finish(work);
	if (is_file)
		try_now(work);
	if (!next_job(work, &job))
		return answered(work);
	made = kept(work, chain, segments);
	if (!made) {
		if (is_file)
			return finish(work);
		work->answer = S_IOERR;
		return answered(work);
	}
	result = carry_on(made, means);
	if (result != -EINPROGRESS)
		free(made);
	else
		*request = made;
	return result;
}

static void start_ranges(struct vt_blk_work *work, struct cursor *data, uint64_t bytes)
{
	uint64_t number = bytes / sizeof(work->ranges[0]);

	work->range = work->range_count = 0;
	work->by_hand = false;
	work->answer = S_IOERR;
	if (work->disk->read_only || !bytes || bytes % sizeof(work->ranges[0]) ||
	    number > VT_BLK_RANGES || !take(data, work->ranges, (size_t)bytes))
		return;
	/* All are judged before any is done. */
	for (uint64_t i = 0; i < number; i++) {
		struct range *range = &work->ranges[i];

		*range = (struct range){ le64toh(range->sector), le32toh(range->sectors),
					 le32toh(range->flags) };
		/* Section 5.2.6.2: unknown flags, and unmap in a discard, are unsupported. */
		if (range->flags & ~RANGE_UNMAP || (work->type == T_DISCARD && range->flags)) {
			work->answer = S_UNSUPP;
			return;
		}
		if (!lies_within(work->disk, range->sector, range->sectors))
			return;
	}
	work->answer = S_OK;
	for (uint64_t i = 0; i < number && work->disk->memory; i++)
		vt_ram_clear(work->disk, work->ranges[i].sector * VT_SECTOR,
		      (uint64_t)work->ranges[i].sectors * VT_SECTOR);
	work->range_count = work->disk->memory ? 0 : (uint32_t)number;
}

/* Check a read or a write, and do it if the disk is in memory. */
static void start_transfer(struct vt_blk_work *work, uint64_t sector, const struct cursor *data,
			   uint64_t bytes, struct iovec *cut)
{
	struct vt_disk *disk = work->disk;
	bool write = work->type == T_OUT;

	work->data_count = 0;
	work->answer = S_IOERR;
	if (!bytes || bytes % VT_SECTOR || (write && disk->read_only) ||
	    !lies_within(disk, sector, bytes / VT_SECTOR))
		return;
	work->answer = S_OK;
	work->at = sector * VT_SECTOR;
	if (disk->memory) {
		vt_ram_copy(disk, work->at, data->segments + data->index, data->inside, bytes, write);
	} else {
		work->data = cut;
		work->data_count = rest(data, bytes, cut);
	}
	work->bytes = bytes;
}

static void get_id(const struct vt_disk *disk, const struct iovec *writable, uint32_t segment_count,
		   uint64_t room)
{
	char id[VT_BLK_ID_BYTES];

	memcpy(id, disk->id, sizeof(id));
	put(writable, segment_count, id, room < sizeof(id) ? (size_t)room : sizeof(id));
}

void vt_blk_expect(const struct vt_disk *disk, const struct vt_chain *chain,
		   const struct iovec *segments)
{
	uint64_t sector, length = chain->writable_bytes;
	struct header header;

	if (!disk->memory || !chain->readable || segments->iov_len < sizeof(header))
		return;
	memcpy(&header, segments->iov_base, sizeof(header));
	sector = le64toh(header.sector);
	if (le32toh(header.type) == T_IN && lies_within(disk, sector, length / VT_SECTOR))
		vt_ram_expect(disk, sector * VT_SECTOR, length);
}

int64_t vt_blk_begin(struct vt_disk *disk, const struct vt_blk_mode *mode,
		     const struct vt_chain *chain, const struct iovec *segments,
		     const struct vt_blk_means *means, struct vt_request **request)
{
	const struct iovec *writable = segments + chain->readable;
	struct cursor readable = { .segments = segments, .count = chain->readable };
	struct cursor room = { .segments = writable, .count = chain->writable };
	uint64_t out = chain->readable_bytes, in = chain->writable_bytes;
	const struct iovec *last = &writable[chain->writable ? chain->writable - 1 : 0];
	struct iovec cut[VT_CHAIN_SEGMENTS];
	struct vt_blk_work work;
	struct header header;

	if (!in || !take(&readable, &header, sizeof(header)))
		return -EPROTO;
	out -= sizeof(header);
	in -= 1;
	work.disk = disk;
	work.status = (uint8_t *)last->iov_base + last->iov_len - 1;
	work.written = (int64_t)in + 1;
	work.answer = S_UNSUPP;
	work.type = le32toh(header.type);
	work.stable = mode->write_through && work.type != T_IN;
	work.synced = false;
	work.tries = 0;
	work.data_count = work.range_count = 0;
	work.bytes = 0;
	switch (work.type) {
	case T_IN:
		count(&disk->figures.reads, 1);
		start_transfer(&work, le64toh(header.sector), &room, in, cut);
		break;
	case T_OUT:
		count(&disk->figures.writes, 1);
		start_transfer(&work, le64toh(header.sector), &readable, out, cut);
		break;
	case T_FLUSH:
		count(&disk->figures.flushes, 1);
		work.answer = S_OK;
		break;
	case T_GET_ID:
		get_id(disk, writable, chain->writable, in);
		work.answer = S_OK;
		return answered(&work);
	case T_DISCARD:
	case T_WRITE_ZEROES:
		if (work.type == T_DISCARD && !disk->discard)
			break;
		count(&disk->figures.discards, 1);
		start_ranges(&work, &readable, out);
		break;
	default:
		break;
	}
	if (disk->memory || work.answer != S_OK)
		return answered(&work);
	return begin(&work, chain, segments, means, request);
}

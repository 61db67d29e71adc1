#define _GNU_SOURCE
#include "virtio/block.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

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

struct vt_disk {
	int fd;
	uint8_t *memory; /* of a disk in memory; NULL for a file */
	uint64_t offset, size;
	uint64_t mapped; /* bytes at `memory` */
	bool read_only, discard;
	char id[VT_BLK_ID_BYTES];
	struct vt_disk_figures figures;
};

/* A place in a chain's segments, for reading it as a stream of bytes. */
struct cursor {
	const struct iovec *segments;
	uint32_t count, index;
	size_t inside;
};

static uint8_t answer(bool done)
{
	return (uint8_t)(done ? S_OK : S_IOERR);
}

static void count(uint64_t *counter, uint64_t by)
{
	__atomic_add_fetch(counter, by, __ATOMIC_RELAXED);
}

int vt_disk_open(const struct vt_disk_settings *settings, struct vt_disk **disk)
{
	struct vt_disk *made;

	*disk = NULL;
	if (!settings->size || settings->size % VT_SECTOR || settings->offset % VT_SECTOR ||
	    settings->size > (uint64_t)INT64_MAX - settings->offset)
		return -EINVAL;
	made = calloc(1, sizeof(*made));
	if (!made)
		return -ENOMEM;
	made->fd = -1;
	made->offset = settings->offset;
	made->size = settings->size;
	made->read_only = settings->read_only;
	made->discard = settings->discard;
	memcpy(made->id, settings->id, sizeof(made->id));
	if (settings->fd >= 0) {
		made->fd = fcntl(settings->fd, F_DUPFD_CLOEXEC, 0);
		if (made->fd < 0) {
			free(made);
			return -errno;
		}
	} else {
		void *at = mmap(NULL, (size_t)settings->size, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (at == MAP_FAILED) {
			free(made);
			return -errno;
		}
		madvise(at, (size_t)settings->size, MADV_DONTFORK);
		made->memory = at;
		made->mapped = settings->size;
	}
	*disk = made;
	return 0;
}

void vt_disk_close(struct vt_disk *disk)
{
	if (!disk)
		return;
	if (disk->memory)
		munmap(disk->memory, (size_t)disk->mapped);
	else
		close(disk->fd);
	free(disk);
}

void vt_disk_resize(struct vt_disk *disk, uint64_t size)
{
	if (disk->memory && size > disk->mapped)
		size = disk->mapped;
	__atomic_store_n(&disk->size, size, __ATOMIC_RELEASE);
}

void vt_disk_figures(const struct vt_disk *disk, struct vt_disk_figures *figures)
{
	const uint64_t *from = (const uint64_t *)&disk->figures;
	uint64_t *to = (uint64_t *)figures;

	for (size_t i = 0; i < sizeof(*figures) / sizeof(uint64_t); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
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

static void copy(struct vt_disk *disk, uint64_t at, const struct iovec *segments,
		 uint32_t segment_count, bool write)
{
	uint8_t *place = disk->memory + at;

	for (uint32_t i = 0; i < segment_count; i++) {
		if (write)
			memcpy(place, segments[i].iov_base, segments[i].iov_len);
		else
			memcpy(segments[i].iov_base, place, segments[i].iov_len);
		place += segments[i].iov_len;
	}
}

/* Move all of the data; the segments are used up. Return: whether it went. */
static bool move(struct vt_disk *disk, uint64_t at, struct iovec *segments, uint32_t segment_count,
		 bool write, bool stable)
{
	off_t place = (off_t)(disk->offset + at);

	if (disk->memory) {
		copy(disk, at, segments, segment_count, write);
		return true;
	}
	while (segment_count) {
		ssize_t moved = write ? pwritev2(disk->fd, segments, (int)segment_count, place,
						 stable ? RWF_DSYNC : 0) :
					preadv(disk->fd, segments, (int)segment_count, place);

		if (moved < 0 && errno == EINTR)
			continue;
		if (moved <= 0)
			return false;
		place += moved;
		while (segment_count && (size_t)moved >= segments->iov_len) {
			moved -= (ssize_t)segments->iov_len;
			segments++;
			segment_count--;
		}
		if (moved) {
			segments->iov_base = (uint8_t *)segments->iov_base + moved;
			segments->iov_len -= (size_t)moved;
		}
	}
	return true;
}

static bool flush(struct vt_disk *disk)
{
	return disk->memory || !fdatasync(disk->fd);
}

static bool write_zeros(struct vt_disk *disk, uint64_t at, uint64_t length)
{
	static const uint8_t zeros[1 << 16];

	while (length) {
		size_t piece = length < sizeof(zeros) ? (size_t)length : sizeof(zeros);
		ssize_t moved = pwrite(disk->fd, zeros, piece, (off_t)(disk->offset + at));

		if (moved < 0 && errno == EINTR)
			continue;
		if (moved <= 0)
			return false;
		at += (uint64_t)moved;
		length -= (uint64_t)moved;
	}
	return true;
}

/* Make a range zeros (`unmap`: its blocks need not stay allocated), or give its blocks up, after
 * which it may read as anything: zeros, here. */
static bool clear(struct vt_disk *disk, uint64_t at, uint64_t length, bool unmap)
{
	int mode = unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;

	if (disk->memory) {
		memset(disk->memory + at, 0, (size_t)length);
		return true;
	}
	if (!fallocate(disk->fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)(disk->offset + at),
		       (off_t)length))
		return true;
	return (errno == EOPNOTSUPP || errno == ENODEV || errno == EINVAL) &&
	       write_zeros(disk, at, length);
}

static uint8_t clear_ranges(struct vt_disk *disk, struct cursor *data, uint64_t bytes, bool discard,
			    bool stable)
{
	struct range ranges[VT_BLK_RANGES];
	uint64_t number = bytes / sizeof(ranges[0]);

	if (!bytes || bytes % sizeof(ranges[0]) || number > VT_BLK_RANGES ||
	    !take(data, ranges, (size_t)bytes))
		return S_IOERR;
	/* All are judged before any is done. */
	for (uint64_t i = 0; i < number; i++) {
		uint32_t flags = le32toh(ranges[i].flags);

		/* Section 5.2.6.2: unknown flags, and unmap in a discard, are unsupported. */
		if (flags & ~RANGE_UNMAP || (discard && flags))
			return S_UNSUPP;
		if (!lies_within(disk, le64toh(ranges[i].sector), le32toh(ranges[i].sectors)))
			return S_IOERR;
	}
	for (uint64_t i = 0; i < number; i++) {
		uint64_t length = (uint64_t)le32toh(ranges[i].sectors) * VT_SECTOR;

		if (length && !clear(disk, le64toh(ranges[i].sector) * VT_SECTOR, length,
				     discard || le32toh(ranges[i].flags) & RANGE_UNMAP))
			return S_IOERR;
	}
	return answer(!stable || flush(disk));
}

static uint8_t transfer(struct vt_disk *disk, const struct vt_blk_mode *mode, uint64_t sector,
			const struct cursor *data, uint64_t bytes, bool write)
{
	struct iovec cut[VT_CHAIN_SEGMENTS];

	if (!bytes || bytes % VT_SECTOR || (write && disk->read_only) ||
	    !lies_within(disk, sector, bytes / VT_SECTOR))
		return S_IOERR;
	if (!move(disk, sector * VT_SECTOR, cut, rest(data, bytes, cut), write,
		  mode->write_through))
		return S_IOERR;
	count(write ? &disk->figures.bytes_written : &disk->figures.bytes_read, bytes);
	return S_OK;
}

int64_t vt_blk_request(struct vt_disk *disk, const struct vt_blk_mode *mode,
		       const struct vt_chain *chain, const struct iovec *segments)
{
	const struct iovec *writable = segments + chain->readable;
	struct cursor readable = { .segments = segments, .count = chain->readable };
	struct cursor room = { .segments = writable, .count = chain->writable };
	uint64_t out = chain->readable_bytes, in = chain->writable_bytes;
	const struct iovec *last = &writable[chain->writable ? chain->writable - 1 : 0];
	struct header header;
	uint8_t status = S_UNSUPP;
	char id[VT_BLK_ID_BYTES];

	if (!in || !take(&readable, &header, sizeof(header)))
		return -EPROTO;
	out -= sizeof(header);
	in -= 1;
	switch (le32toh(header.type)) {
	case T_IN:
		count(&disk->figures.reads, 1);
		status = transfer(disk, mode, le64toh(header.sector), &room, in, false);
		break;
	case T_OUT:
		count(&disk->figures.writes, 1);
		status = transfer(disk, mode, le64toh(header.sector), &readable, out, true);
		break;
	case T_FLUSH:
		count(&disk->figures.flushes, 1);
		status = answer(flush(disk));
		break;
	case T_GET_ID:
		memcpy(id, disk->id, sizeof(id));
		put(writable, chain->writable, id, in < sizeof(id) ? (size_t)in : sizeof(id));
		status = S_OK;
		break;
	case T_DISCARD:
	case T_WRITE_ZEROES:
		if (le32toh(header.type) == T_DISCARD && !disk->discard)
			break;
		count(&disk->figures.discards, 1);
		status = disk->read_only ? S_IOERR :
					   clear_ranges(disk, &readable, out,
							le32toh(header.type) == T_DISCARD,
							mode->write_through);
		break;
	default:
		break;
	}
	if (status != S_OK)
		count(&disk->figures.failed, 1);
	((volatile uint8_t *)last->iov_base)[last->iov_len - 1] = status;
	return (int64_t)in + 1;
}

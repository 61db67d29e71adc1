/* virtio-blk requests on a disk in memory or in a file (Virtual I/O Device 1.2, section 5.2).
 *
 * A request is read from its chain as a byte stream, however the driver framed it: 16 bytes of
 * header first, one byte of status last. What it says is checked against the disk with sums that
 * cannot overflow. A disk may be used by many queues and threads at once; it keeps no position.
 */
#ifndef VT_VIRTIO_BLOCK_H
#define VT_VIRTIO_BLOCK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "virtio/io.h"
#include "virtio/port.h"
#include "virtio/ring.h"

#define VT_SECTOR 512u
/* Of one discard or write-zeroes request; announced to the driver as such. */
#define VT_BLK_RANGES 16u
#define VT_BLK_ID_BYTES 20u

struct vt_disk;

struct vt_disk_settings {
	int fd;               /* of a raw image or a block device; -1 for memory. Not kept: duplicated */
	bool mapped;          /* `fd` is memory that cannot shrink (a sealed memfd): used as such */
	int direct_fd;        /* the same, opened with O_DIRECT, for what is aligned; -1: none. Duplicated */
	uint64_t offset;      /* of the disk's first byte in the file, a multiple of VT_SECTOR */
	uint64_t size;        /* bytes, a multiple of VT_SECTOR */
	bool read_only;
	bool discard;         /* holes can be punched, and discard was announced */
	char id[VT_BLK_ID_BYTES]; /* the serial, padded with zeros */
	struct vt_port_place place; /* on an NVMe controller, if place.block_bytes is not 0; `fd` is -1 */
};

/* Counters of one disk since it was opened; each is exact, not all of one moment. */
struct vt_disk_figures {
	uint64_t reads, writes, flushes, discards;
	uint64_t bytes_read, bytes_written;
	uint64_t failed;      /* answered with an error */
};

/* Open a disk. Return: 0, -EINVAL for sizes that are no multiples, -ENOMEM, or what dup or mmap say. */
int vt_disk_open(const struct vt_disk_settings *settings, struct vt_disk **disk);

/* Close a disk that no queue uses any more. `disk` may be NULL. */
void vt_disk_close(struct vt_disk *disk);

/* Change the size that requests are checked against: after the image was resized. */
void vt_disk_resize(struct vt_disk *disk, uint64_t size);

/* With `mute`, have no driver of a disk signalled any more: the interrupt of one blocks, and each of its
 * queues would hold its worker up by as much. Workers do that; control ends the driver, and undoes it. */
void vt_disk_mute(struct vt_disk *disk, bool mute);
bool vt_disk_is_muted(const struct vt_disk *disk);

void vt_disk_figures(const struct vt_disk *disk, struct vt_disk_figures *figures);

/* How the driver of one queue's device uses the disk. */
struct vt_blk_mode {
	bool write_through;   /* it negotiated no flush: a write that is answered is on the disk */
};

/* By what the calling thread reaches disks; each may be NULL. */
struct vt_blk_means {
	struct vt_io *io;             /* its ring; without one files are waited for */
	struct vt_port *port;         /* to the controller of this disk, if it is on one */
	const struct vt_memory *memory; /* in which the chain's segments lie */
};

/* A request that waits for its disk. What it moves data to and from, and where its answer goes, has
 * to stay mapped until it has ended. */
struct vt_request {
	void *queue;              /* the caller's: whose it is, its memory, and a list of them */
	struct vt_request *next, **link;
	struct vt_memory *memory;
	struct vt_chain chain;    /* as it was fetched, with `first` 0 */
	struct iovec *segments;   /* those of the chain */
	struct vt_blk_work *work; /* block.c's own */
};

/* A request that will be begun soon: have the processor fetch what it reads, if the disk is in
 * memory. What it says is read again when it is begun. */
void vt_blk_expect(const struct vt_disk *disk, const struct vt_chain *chain,
		   const struct iovec *segments);

/* Do one request, or begin it. `segments` are those of the chain; they and the chain are copied if
 * they are needed for longer. Without a ring everything on a file is done at once, as what needs no
 * waiting always is.
 *
 * Return: the number of bytes to report as written (the status included); -EPROTO for a chain that
 * has no room for a header and a status, which breaks the ring it came from; -EINPROGRESS with
 * `*request`, whose result vt_io_reap or vt_port_reap gives with the request as its tag.
 */
int64_t vt_blk_begin(struct vt_disk *disk, const struct vt_blk_mode *mode,
		     const struct vt_chain *chain, const struct iovec *segments,
		     const struct vt_blk_means *means, struct vt_request **request);

/* Go on with a request, whose job ended with `result`. Without means (NULL) nothing more is begun.
 * Return: the bytes to report as written; -EINPROGRESS, when another job was begun; -ECANCELED, when
 * one would have had to be: the request is not answered, and doing it again does no harm. */
int64_t vt_blk_continue(struct vt_request *request, const struct vt_blk_means *means,
			int64_t result);

/* Free a request that has ended. */
void vt_blk_end(struct vt_request *request);

#endif

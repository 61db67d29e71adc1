/* The inside of a disk, for disk.c and block.c alone. */
#ifndef VT_VIRTIO_DISK_H
#define VT_VIRTIO_DISK_H

#include "virtio/block.h"

struct vt_disk {
	int fd, direct_fd;
	uint32_t alignment;
	bool quick;      /* the file lies in memory: nothing is gained by waiting for it elsewhere */
	bool holds;      /* its file system may wait where it was asked not to */
	int no_nowait[2]; /* the file system does not know RWF_NOWAIT for reads, for writes */
	uint8_t *memory; /* of a disk in memory; NULL for others */
	struct vt_port_place place; /* of a disk on a controller */
	uint64_t offset, size;
	uint64_t mapped; /* bytes at `memory` */
	bool read_only, discard;
	bool muted;      /* by workers and control */
	char id[VT_BLK_ID_BYTES];
	struct vt_disk_figures figures;
};

#endif

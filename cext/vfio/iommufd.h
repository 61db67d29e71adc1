/* iommufd and the VFIO device cdev. See <linux/iommufd.h> and, for the device's side,
 * VFIO_DEVICE_BIND_IOMMUFD and VFIO_DEVICE_ATTACH_IOMMUFD_PT in <linux/vfio.h>. */
#ifndef VT_IOMMUFD_H
#define VT_IOMMUFD_H

#include <stdint.h>

int vt_iommufd_ioas_alloc(int iommufd, uint32_t *ioas);
int vt_iommufd_destroy(int iommufd, uint32_t id);
/* Fills at most `room` pairs (start, last) of 64-bit numbers into `ranges`; `count` comes back as
 * how many there are. -EMSGSIZE if there are more than `room`. */
int vt_iommufd_ranges(int iommufd, uint32_t ioas, uint64_t *ranges, uint32_t room,
		      uint32_t *count, uint64_t *alignment);
/* `flags` are those of vt_type1_map (1: the device reads, 2: it writes). */
int vt_iommufd_map(int iommufd, uint32_t ioas, uint64_t address, uint64_t iova, uint64_t size,
		   uint32_t flags);
int vt_iommufd_unmap(int iommufd, uint32_t ioas, uint64_t iova, uint64_t *size);
/* As vt_type1_map_many and vt_type1_unmap_many. */
int vt_iommufd_map_many(int iommufd, uint32_t ioas, const uint64_t *triples, uint32_t count,
			uint32_t flags, uint32_t *done);
int vt_iommufd_unmap_many(int iommufd, uint32_t ioas, const uint64_t *pairs, uint32_t count,
			  uint64_t *unmapped, uint32_t *done);
/* A page table for device `devid` over `ioas` that records what devices write. */
int vt_iommufd_dirty_hwpt(int iommufd, uint32_t devid, uint32_t ioas, uint32_t *hwpt);
int vt_iommufd_dirty_track(int iommufd, uint32_t hwpt, int start);
int vt_iommufd_dirty_bitmap(int iommufd, uint32_t hwpt, uint64_t iova, uint64_t size,
			    uint64_t page_size, void *bitmap);

int vt_cdev_bind(int device, int iommufd, uint32_t *devid);
int vt_cdev_attach(int device, uint32_t pt);
int vt_cdev_detach(int device);

#endif

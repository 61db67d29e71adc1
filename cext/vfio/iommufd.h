/* iommufd and the VFIO device cdev. See <linux/iommufd.h> and, for the device's side,
 * VFIO_DEVICE_BIND_IOMMUFD and VFIO_DEVICE_ATTACH_IOMMUFD_PT in <linux/vfio.h>. */
#ifndef VT_IOMMUFD_H
#define VT_IOMMUFD_H

#include <stdint.h>

/* Each function returns 0 or -errno. */

/* Makes an I/O address space; `ioas` comes back as its id. */
int vt_iommufd_ioas_alloc(int iommufd, uint32_t *ioas);
/* Takes an object away by its id: an address space, a page table. -EBUSY while it is in use. */
int vt_iommufd_destroy(int iommufd, uint32_t id);
/* Fills at most `room` pairs (start, last) of 64-bit numbers into `ranges`; `count` comes back as
 * how many there are. -EMSGSIZE if there are more than `room`. */
int vt_iommufd_ranges(int iommufd, uint32_t ioas, uint64_t *ranges, uint32_t room, uint32_t *count,
		      uint64_t *alignment);
/* A page table for device `devid` over `ioas` that records what devices write. */
int vt_iommufd_dirty_hwpt(int iommufd, uint32_t devid, uint32_t ioas, uint32_t *hwpt);
/* Begins (`start` 1) or ends the recording by page table `hwpt`. */
int vt_iommufd_dirty_track(int iommufd, uint32_t hwpt, int start);
/* One bit a page of `page_size` bytes of the range into `bitmap`, in whole 64-bit words; the record
 * is cleared. */
int vt_iommufd_dirty_bitmap(int iommufd, uint32_t hwpt, uint64_t iova, uint64_t size,
			    uint64_t page_size, void *bitmap);

/* Gives an opened device to the iommufd; `devid` comes back as its id there. */
int vt_cdev_bind(int device, int iommufd, uint32_t *devid);
/* Lets the device's DMA go through `pt`: an address space, or a page table over one. */
int vt_cdev_attach(int device, uint32_t pt);
/* Stops its DMA. */
int vt_cdev_detach(int device);

#endif

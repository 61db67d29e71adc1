/* VFIO: containers, groups, devices, regions and features. See <linux/vfio.h>.
 *
 * Every function returns 0 or a non-negative result, or -errno.
 */
#ifndef VT_VFIO_H
#define VT_VFIO_H

#include <stdint.h>

/* VFIO_GET_API_VERSION. */
int vt_container_version(int container);
/* 1 if the container supports `extension`, 0 if not. */
int vt_container_check(int container, int extension);
/* Sets the IOMMU model, once it holds a group: VFIO_TYPE1v2_IOMMU (3) or VFIO_NOIOMMU_IOMMU (8). */
int vt_container_set_iommu(int container, int type);
/* The argsz protocol of vt_info: struct vfio_iommu_type1_info with its capabilities. */
int vt_type1_info(int container, void *buffer, uint32_t size);

/* `flags`: VFIO_GROUP_FLAGS_VIABLE (1), _CONTAINER_SET (2). */
int vt_group_status(int group, uint32_t *flags);
/* Puts the group into the container, and takes it out (-EBUSY while a device of it is open). */
int vt_group_set_container(int group, int container);
int vt_group_unset_container(int group);
/* A descriptor of the device. `name` is what the bus calls the device, for a VF with a token
 * followed by " vf_token=UUID". */
int vt_group_device(int group, const char *name);

/* The argsz protocol of vt_info: struct vfio_device_info and vfio_region_info with their
 * capabilities. -EINVAL for an index that the device has not. */
int vt_device_info(int device, void *buffer, uint32_t size);
int vt_region_info(int device, uint32_t index, void *buffer, uint32_t size);
/* The flags and the number of interrupts of an index. */
int vt_irq_info(int device, uint32_t index, uint32_t *flags, uint32_t *count);
/* Resets the function alone. */
int vt_device_reset(int device);
/* struct vfio_pci_hot_reset_info into `buffer`; -ENOSPC if it has more devices than fit, and then
 * their number all the same. */
int vt_hot_reset_info(int device, void *buffer, uint32_t size);
/* Resets slot or bus; `group_fds` are the groups of all functions that it reaches (none for
 * iommufd, where they are those bound to the same one). */
int vt_hot_reset(int device, const int32_t *group_fds, uint32_t count);
/* `flags` is the feature's number with VFIO_DEVICE_FEATURE_GET, _SET or _PROBE; `data` goes in
 * and comes back (`length` bytes, at most 4096). */
int vt_device_feature(int device, uint32_t flags, void *data, uint32_t length);

/* One access of exactly `width` (1, 2, 4, 8) bytes at file position `position`: a register is
 * never split. Values are the host's numbers, the device's bytes are little-endian. */
int vt_region_read(int device, uint64_t position, uint32_t width, uint64_t *value);
int vt_region_write(int device, uint64_t position, uint32_t width, uint64_t value);
/* Plain copies through read(2) and write(2); the kernel chooses the widths. */
int vt_region_copy_out(int device, uint64_t position, void *buffer, uint64_t length);
int vt_region_copy_in(int device, uint64_t position, const void *buffer, uint64_t length);

#endif

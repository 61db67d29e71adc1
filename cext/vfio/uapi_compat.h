/* The parts of the VFIO and iommufd user interface that this library uses, in its own words.
 *
 * Debian 12 ships headers of Linux 6.1, which know neither iommufd nor the device cdev; and what
 * the running kernel offers has nothing to do with the headers at build time. So the layouts are
 * written here, their sizes asserted, and each facility is probed at run time.
 * Source of every number: include/uapi/linux/vfio.h and include/uapi/linux/iommufd.h.
 */
#ifndef VT_UAPI_COMPAT_H
#define VT_UAPI_COMPAT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define VT_VFIO_IO(number) _IO(';', 100 + (number))
#define VT_IOMMUFD_IO(number) _IO(';', 0x80 + (number))
#define VT_ASSERT_SIZE(type, bytes)                                                                \
	_Static_assert(sizeof(type) == (bytes), #type " has changed size")

/* Container (/dev/vfio/vfio). */
#define VT_VFIO_GET_API_VERSION VT_VFIO_IO(0)
#define VT_VFIO_CHECK_EXTENSION VT_VFIO_IO(1)
#define VT_VFIO_SET_IOMMU VT_VFIO_IO(2)
#define VT_VFIO_IOMMU_GET_INFO VT_VFIO_IO(12)
#define VT_VFIO_IOMMU_MAP_DMA VT_VFIO_IO(13)
#define VT_VFIO_IOMMU_UNMAP_DMA VT_VFIO_IO(14)
#define VT_VFIO_IOMMU_DIRTY_PAGES VT_VFIO_IO(17)

/* Group (/dev/vfio/N). */
#define VT_VFIO_GROUP_GET_STATUS VT_VFIO_IO(3)
#define VT_VFIO_GROUP_SET_CONTAINER VT_VFIO_IO(4)
#define VT_VFIO_GROUP_UNSET_CONTAINER VT_VFIO_IO(5)
#define VT_VFIO_GROUP_GET_DEVICE_FD VT_VFIO_IO(6)

/* Device. */
#define VT_VFIO_DEVICE_GET_INFO VT_VFIO_IO(7)
#define VT_VFIO_DEVICE_GET_REGION_INFO VT_VFIO_IO(8)
#define VT_VFIO_DEVICE_GET_IRQ_INFO VT_VFIO_IO(9)
#define VT_VFIO_DEVICE_SET_IRQS VT_VFIO_IO(10)
#define VT_VFIO_DEVICE_RESET VT_VFIO_IO(11)
#define VT_VFIO_DEVICE_GET_PCI_HOT_RESET_INFO VT_VFIO_IO(12)
#define VT_VFIO_DEVICE_PCI_HOT_RESET VT_VFIO_IO(13)
#define VT_VFIO_DEVICE_QUERY_GFX_PLANE VT_VFIO_IO(14)
#define VT_VFIO_DEVICE_GET_GFX_DMABUF VT_VFIO_IO(15)
#define VT_VFIO_DEVICE_FEATURE VT_VFIO_IO(17)
#define VT_VFIO_DEVICE_BIND_IOMMUFD VT_VFIO_IO(18)
#define VT_VFIO_DEVICE_ATTACH_PT VT_VFIO_IO(19)
#define VT_VFIO_DEVICE_DETACH_PT VT_VFIO_IO(20)

#define VT_IRQ_DATA_NONE (1u << 0)
#define VT_IRQ_DATA_BOOL (1u << 1)
#define VT_IRQ_DATA_EVENTFD (1u << 2)
#define VT_IRQ_MASK (1u << 3)
#define VT_IRQ_UNMASK (1u << 4)
#define VT_IRQ_TRIGGER (1u << 5)

#define VT_DMA_READ (1u << 0)
#define VT_DMA_WRITE (1u << 1)
#define VT_DMA_UNMAP_GET_DIRTY (1u << 0)
#define VT_DMA_UNMAP_ALL (1u << 1)

#define VT_DIRTY_START (1u << 0)
#define VT_DIRTY_STOP (1u << 1)
#define VT_DIRTY_GET_BITMAP (1u << 2)

struct vt_group_status {
	uint32_t argsz, flags;
};
VT_ASSERT_SIZE(struct vt_group_status, 8);

struct vt_device_info {
	uint32_t argsz, flags, num_regions, num_irqs, cap_offset;
};
VT_ASSERT_SIZE(struct vt_device_info, 20);

struct vt_region_info {
	uint32_t argsz, flags, index, cap_offset;
	uint64_t size, offset;
};
VT_ASSERT_SIZE(struct vt_region_info, 32);

struct vt_irq_info {
	uint32_t argsz, flags, index, count;
};
VT_ASSERT_SIZE(struct vt_irq_info, 16);

struct vt_irq_set {
	uint32_t argsz, flags, index, start, count;
	int32_t fds[];
};
VT_ASSERT_SIZE(struct vt_irq_set, 20);

struct vt_hot_reset_info {
	uint32_t argsz, flags, count;
};
VT_ASSERT_SIZE(struct vt_hot_reset_info, 12);

struct vt_hot_reset {
	uint32_t argsz, flags, count;
	int32_t group_fds[];
};
VT_ASSERT_SIZE(struct vt_hot_reset, 12);

struct vt_feature {
	uint32_t argsz, flags;
	uint8_t data[];
};
VT_ASSERT_SIZE(struct vt_feature, 8);

struct vt_type1_info {
	uint32_t argsz, flags;
	uint64_t page_sizes;
	uint32_t cap_offset, reserved;
};
VT_ASSERT_SIZE(struct vt_type1_info, 24);

struct vt_dma_map {
	uint32_t argsz, flags;
	uint64_t vaddr, iova, size;
};
VT_ASSERT_SIZE(struct vt_dma_map, 32);

struct vt_dma_unmap {
	uint32_t argsz, flags;
	uint64_t iova, size;
};
VT_ASSERT_SIZE(struct vt_dma_unmap, 24);

struct vt_dirty_get {
	uint32_t argsz, flags;
	uint64_t iova, size, page_size, bitmap_bytes, bitmap;
};
VT_ASSERT_SIZE(struct vt_dirty_get, 48);

struct vt_bind_iommufd {
	uint32_t argsz, flags;
	int32_t iommufd;
	uint32_t out_devid;
};
VT_ASSERT_SIZE(struct vt_bind_iommufd, 16);

struct vt_attach_pt {
	uint32_t argsz, flags, pt_id;
};
VT_ASSERT_SIZE(struct vt_attach_pt, 12);

struct vt_detach_pt {
	uint32_t argsz, flags;
};
VT_ASSERT_SIZE(struct vt_detach_pt, 8);

/* iommufd (/dev/iommu). */
#define VT_IOMMU_DESTROY VT_IOMMUFD_IO(0)
#define VT_IOMMU_IOAS_ALLOC VT_IOMMUFD_IO(1)
#define VT_IOMMU_IOAS_COPY VT_IOMMUFD_IO(3)
#define VT_IOMMU_IOAS_IOVA_RANGES VT_IOMMUFD_IO(4)
#define VT_IOMMU_IOAS_MAP VT_IOMMUFD_IO(5)
#define VT_IOMMU_IOAS_UNMAP VT_IOMMUFD_IO(6)
#define VT_IOMMU_HWPT_ALLOC VT_IOMMUFD_IO(9)
#define VT_IOMMU_HWPT_SET_DIRTY VT_IOMMUFD_IO(11)
#define VT_IOMMU_HWPT_GET_DIRTY VT_IOMMUFD_IO(12)

#define VT_IOAS_MAP_FIXED_IOVA (1u << 0)
#define VT_IOAS_MAP_WRITEABLE (1u << 1)
#define VT_IOAS_MAP_READABLE (1u << 2)
#define VT_HWPT_ALLOC_DIRTY_TRACKING (1u << 1)

struct vt_iommu_destroy {
	uint32_t size, id;
};
VT_ASSERT_SIZE(struct vt_iommu_destroy, 8);

struct vt_ioas_alloc {
	uint32_t size, flags, out_ioas_id;
};
VT_ASSERT_SIZE(struct vt_ioas_alloc, 12);

struct vt_iova_range {
	uint64_t start, last;
};
VT_ASSERT_SIZE(struct vt_iova_range, 16);

struct vt_ioas_iova_ranges {
	uint32_t size, ioas_id, num_iovas, reserved;
	uint64_t allowed_iovas, out_iova_alignment;
};
VT_ASSERT_SIZE(struct vt_ioas_iova_ranges, 32);

struct vt_ioas_map {
	uint32_t size, flags, ioas_id, reserved;
	uint64_t user_va, length, iova;
};
VT_ASSERT_SIZE(struct vt_ioas_map, 40);

struct vt_ioas_unmap {
	uint32_t size, ioas_id;
	uint64_t iova, length;
};
VT_ASSERT_SIZE(struct vt_ioas_unmap, 24);

struct vt_hwpt_alloc {
	uint32_t size, flags, dev_id, pt_id, out_hwpt_id, reserved, data_type, data_len;
	uint64_t data_uptr;
};
VT_ASSERT_SIZE(struct vt_hwpt_alloc, 40);

struct vt_hwpt_set_dirty {
	uint32_t size, flags, hwpt_id, reserved;
};
VT_ASSERT_SIZE(struct vt_hwpt_set_dirty, 16);

struct vt_hwpt_get_dirty {
	uint32_t size, hwpt_id, flags, reserved;
	uint64_t iova, length, page_size, data;
};
VT_ASSERT_SIZE(struct vt_hwpt_get_dirty, 48);

#endif

/* Planes of a display device: VFIO_DEVICE_QUERY_GFX_PLANE and VFIO_DEVICE_GET_GFX_DMABUF in
 * <linux/vfio.h>. */
#ifndef VT_GFX_H
#define VT_GFX_H

#include <stdint.h>

struct vt_gfx_plane {
	uint32_t argsz, flags, plane_type, drm_format;
	uint64_t drm_format_modifier;
	uint32_t width, height, stride, size;
	uint32_t x_pos, y_pos, x_hot, y_hot;
	uint32_t where; /* a region's index, or a dma-buf's id */
	uint32_t reserved;
};

/* `flags` is VFIO_GFX_PLANE_TYPE_DMABUF (2) or _REGION (4), with _PROBE (1) only to ask whether
 * the device does it. 0 or -errno. */
int vt_gfx_plane(int device, uint32_t flags, uint32_t plane_type, struct vt_gfx_plane *plane);
/* A descriptor of the dma-buf `id`, close-on-exec, or -errno. */
int vt_gfx_dmabuf(int device, uint32_t id);
/* Brackets reading a mapped dma-buf by the processor (DMA_BUF_IOCTL_SYNC, <linux/dma-buf.h>). */
int vt_dmabuf_read_sync(int dmabuf, int begin);

#endif

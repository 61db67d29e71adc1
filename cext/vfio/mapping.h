/* DMA mappings, made and taken away: of a type1 container (<linux/vfio.h>) and of an I/O address
 * space of an iommufd (<linux/iommufd.h>). For vfiotool.native._types alone.
 *
 * Each function returns 0 or -errno, and may be called by any thread. Addresses and sizes are
 * bytes.
 */
#ifndef VT_MAPPING_H
#define VT_MAPPING_H

#include <stdint.h>

/* Lets devices reach `size` bytes of this process from `address` on at `iova`. `flags` are
 * VFIO_DMA_MAP_FLAG_READ (1) and _WRITE (2), seen from the device. -EEXIST where something is
 * mapped; -EINVAL for what is not in whole pages or not allowed; -EFAULT; -ENOMEM beyond
 * RLIMIT_MEMLOCK. */
int vt_type1_map(int container, uint64_t address, uint64_t iova, uint64_t size, uint32_t flags);
/* `size` goes in as the length and comes back as the bytes unmapped: an empty range succeeds with
 * 0. `flags` may be VFIO_DMA_UNMAP_FLAG_ALL (2) with iova and size 0. -EINVAL for a part of a
 * mapping. */
int vt_type1_unmap(int container, uint64_t iova, uint64_t *size, uint32_t flags);
/* The same for many: `triples` are (address, iova, size). `done` comes back as how many were mapped
 * before the first failure, whose errno is returned: they stay mapped. */
int vt_type1_map_many(int container, const uint64_t *triples, uint32_t count, uint32_t flags,
		      uint32_t *done);
/* `pairs` are (iova, size); `unmapped` is the sum of the bytes that were mapped, `done` as above.
 */
int vt_type1_unmap_many(int container, const uint64_t *pairs, uint32_t count, uint64_t *unmapped,
			uint32_t *done);

/* As vt_type1_map, into the address space `ioas`. */
int vt_iommufd_map(int iommufd, uint32_t ioas, uint64_t address, uint64_t iova, uint64_t size,
		   uint32_t flags);
/* As vt_type1_unmap, but -ENOENT both for an empty range and for a part of a mapping. */
int vt_iommufd_unmap(int iommufd, uint32_t ioas, uint64_t iova, uint64_t *size);
/* As vt_type1_map_many and vt_type1_unmap_many. */
int vt_iommufd_map_many(int iommufd, uint32_t ioas, const uint64_t *triples, uint32_t count,
			uint32_t flags, uint32_t *done);
int vt_iommufd_unmap_many(int iommufd, uint32_t ioas, const uint64_t *pairs, uint32_t count,
			  uint64_t *unmapped, uint32_t *done);

#endif

#include "vfio/mapping.h"

#include "vfio/ioctl.h"
#include "vfio/uapi_compat.h"

int vt_type1_map(int container, uint64_t address, uint64_t iova, uint64_t size, uint32_t flags)
{
	struct vt_dma_map map = {
		.argsz = sizeof(map),
		.flags = flags,
		.vaddr = address,
		.iova = iova,
		.size = size,
	};

	return vt_ioctl(container, VT_VFIO_IOMMU_MAP_DMA, &map);
}

int vt_type1_unmap(int container, uint64_t iova, uint64_t *size, uint32_t flags)
{
	struct vt_dma_unmap unmap = {
		.argsz = sizeof(unmap),
		.flags = flags,
		.iova = iova,
		.size = *size,
	};
	int result = vt_ioctl(container, VT_VFIO_IOMMU_UNMAP_DMA, &unmap);

	*size = unmap.size;
	return result;
}

int vt_type1_map_many(int container, const uint64_t *triples, uint32_t count, uint32_t flags,
		      uint32_t *done)
{
	for (*done = 0; *done < count; ++*done, triples += 3) {
		int result = vt_type1_map(container, triples[0], triples[1], triples[2], flags);

		if (result < 0)
			return result;
	}
	return 0;
}

int vt_type1_unmap_many(int container, const uint64_t *pairs, uint32_t count, uint64_t *unmapped,
			uint32_t *done)
{
	*unmapped = 0;
	for (*done = 0; *done < count; ++*done, pairs += 2) {
		uint64_t size = pairs[1];
		int result = vt_type1_unmap(container, pairs[0], &size, 0);

		if (result < 0)
			return result;
		*unmapped += size;
	}
	return 0;
}

int vt_iommufd_map(int iommufd, uint32_t ioas, uint64_t address, uint64_t iova, uint64_t size,
		   uint32_t flags)
{
	struct vt_ioas_map request = {
		.size = sizeof(request),
		.flags = VT_IOAS_MAP_FIXED_IOVA | (flags & VT_DMA_READ ? VT_IOAS_MAP_READABLE : 0) |
			 (flags & VT_DMA_WRITE ? VT_IOAS_MAP_WRITEABLE : 0),
		.ioas_id = ioas,
		.user_va = address,
		.length = size,
		.iova = iova,
	};

	return vt_ioctl(iommufd, VT_IOMMU_IOAS_MAP, &request);
}

int vt_iommufd_unmap(int iommufd, uint32_t ioas, uint64_t iova, uint64_t *size)
{
	struct vt_ioas_unmap request = {
		.size = sizeof(request),
		.ioas_id = ioas,
		.iova = iova,
		.length = *size,
	};
	int result = vt_ioctl(iommufd, VT_IOMMU_IOAS_UNMAP, &request);

	*size = result < 0 ? 0 : request.length;
	return result;
}

int vt_iommufd_map_many(int iommufd, uint32_t ioas, const uint64_t *triples, uint32_t count,
			uint32_t flags, uint32_t *done)
{
	for (*done = 0; *done < count; ++*done, triples += 3) {
		int result = vt_iommufd_map(iommufd, ioas, triples[0], triples[1], triples[2],
					    flags);

		if (result < 0)
			return result;
	}
	return 0;
}

int vt_iommufd_unmap_many(int iommufd, uint32_t ioas, const uint64_t *pairs, uint32_t count,
			  uint64_t *unmapped, uint32_t *done)
{
	*unmapped = 0;
	for (*done = 0; *done < count; ++*done, pairs += 2) {
		uint64_t size = pairs[1];
		int result = vt_iommufd_unmap(iommufd, ioas, pairs[0], &size);

		if (result < 0)
			return result;
		*unmapped += size;
	}
	return 0;
}

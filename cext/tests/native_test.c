/* Tests of the library's own C against a kernel that is a function: `ioctl` is wrapped by the
 * linker. Run by tests/test_cext.py under the sanitizers. Exits 0, or says what was wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/vfio.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/check.h"
#include "vfio/dma.h"
#include "vfio/iommufd.h"
#include "vfio/ioctl.h"
#include "vfio/interrupt.h"
#include "vfio/irq.h"
#include "vfio/mapping.h"
#include "vfio/mmio.h"
#include "vfio/uapi_compat.h"
#include "vfio/vfio.h"

/* Our own definitions against the build machine's, wherever those know the structure. */
#define SAME(ours, theirs) _Static_assert((ours) == (theirs), #theirs " differs from ours")
SAME(VT_VFIO_GET_API_VERSION, VFIO_GET_API_VERSION);
SAME(VT_VFIO_CHECK_EXTENSION, VFIO_CHECK_EXTENSION);
SAME(VT_VFIO_SET_IOMMU, VFIO_SET_IOMMU);
SAME(VT_VFIO_GROUP_GET_STATUS, VFIO_GROUP_GET_STATUS);
SAME(VT_VFIO_GROUP_SET_CONTAINER, VFIO_GROUP_SET_CONTAINER);
SAME(VT_VFIO_GROUP_UNSET_CONTAINER, VFIO_GROUP_UNSET_CONTAINER);
SAME(VT_VFIO_GROUP_GET_DEVICE_FD, VFIO_GROUP_GET_DEVICE_FD);
SAME(VT_VFIO_DEVICE_GET_INFO, VFIO_DEVICE_GET_INFO);
SAME(VT_VFIO_DEVICE_GET_REGION_INFO, VFIO_DEVICE_GET_REGION_INFO);
SAME(VT_VFIO_DEVICE_GET_IRQ_INFO, VFIO_DEVICE_GET_IRQ_INFO);
SAME(VT_VFIO_DEVICE_SET_IRQS, VFIO_DEVICE_SET_IRQS);
SAME(VT_VFIO_DEVICE_RESET, VFIO_DEVICE_RESET);
SAME(VT_VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO);
SAME(VT_VFIO_DEVICE_PCI_HOT_RESET, VFIO_DEVICE_PCI_HOT_RESET);
SAME(VT_VFIO_DEVICE_QUERY_GFX_PLANE, VFIO_DEVICE_QUERY_GFX_PLANE);
SAME(VT_VFIO_DEVICE_GET_GFX_DMABUF, VFIO_DEVICE_GET_GFX_DMABUF);
SAME(VT_VFIO_IOMMU_GET_INFO, VFIO_IOMMU_GET_INFO);
SAME(VT_VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_MAP_DMA);
SAME(VT_VFIO_IOMMU_UNMAP_DMA, VFIO_IOMMU_UNMAP_DMA);
SAME(VT_VFIO_IOMMU_DIRTY_PAGES, VFIO_IOMMU_DIRTY_PAGES);
SAME(VT_VFIO_DEVICE_FEATURE, VFIO_DEVICE_FEATURE);
SAME(sizeof(struct vt_region_info), sizeof(struct vfio_region_info));
SAME(sizeof(struct vt_irq_info), sizeof(struct vfio_irq_info));
SAME(sizeof(struct vt_irq_set), sizeof(struct vfio_irq_set));
SAME(sizeof(struct vt_dma_map), sizeof(struct vfio_iommu_type1_dma_map));
SAME(sizeof(struct vt_dma_unmap), sizeof(struct vfio_iommu_type1_dma_unmap));
SAME(sizeof(struct vt_hot_reset_info), sizeof(struct vfio_pci_hot_reset_info));
SAME(sizeof(struct vt_feature), sizeof(struct vfio_device_feature));
SAME(sizeof(struct vt_dirty_get), sizeof(struct vfio_iommu_type1_dirty_bitmap) +
					  sizeof(struct vfio_iommu_type1_dirty_bitmap_get));
SAME(offsetof(struct vt_region_info, size), offsetof(struct vfio_region_info, size));
SAME(VT_IRQ_DATA_EVENTFD, VFIO_IRQ_SET_DATA_EVENTFD);
SAME(VT_IRQ_TRIGGER, VFIO_IRQ_SET_ACTION_TRIGGER);

/* What the fake kernel saw last, and what it is to answer. */
static struct {
	unsigned long request;
	uint32_t wanted; /* the argsz that it asks for */
	int result, error, calls;
	uint8_t argument[256];
} kernel;

int __wrap_ioctl(int fd, unsigned long request, ...);

int __wrap_ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;
	uint32_t argsz;

	(void)fd;
	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	kernel.calls++;
	kernel.request = request;
	if (kernel.error) {
		errno = kernel.error;
		return -1;
	}
	if (request == VT_VFIO_DEVICE_GET_REGION_INFO || request == VT_VFIO_DEVICE_GET_INFO) {
		memcpy(&argsz, argument, sizeof(argsz));
		/* As mbochs does: nothing but the structure or the size once asked for. */
		if (argsz != sizeof(struct vt_region_info) && argsz != kernel.wanted &&
		    request == VT_VFIO_DEVICE_GET_REGION_INFO) {
			errno = EINVAL;
			return -1;
		}
		/* A short buffer still gets the CAPS flag, and garbage to be forgotten. */
		memset((char *)argument + 4, argsz < kernel.wanted ? 0xff : 0x11, 4);
		memcpy(argument, &kernel.wanted, sizeof(kernel.wanted));
		return 0;
	}
	if (argument && request != VT_VFIO_SET_IOMMU && request != VT_VFIO_CHECK_EXTENSION &&
	    request != VT_VFIO_GROUP_GET_DEVICE_FD && request != VT_VFIO_GROUP_SET_CONTAINER) {
		memcpy(&argsz, argument, sizeof(argsz));
		memcpy(kernel.argument, argument,
		       argsz < sizeof(kernel.argument) ? argsz : sizeof(kernel.argument));
	}
	return kernel.result;
}

static void forget(void)
{
	memset(&kernel, 0, sizeof(kernel));
}

static void info_asks_again_with_what_the_kernel_needs(void)
{
	uint8_t buffer[512];
	uint32_t word;

	forget();
	kernel.wanted = sizeof(struct vt_region_info);
	CHECK(vt_region_info(3, 2, buffer, sizeof(buffer)) == 32);
	CHECK(kernel.calls == 1);
	kernel.wanted = 200;
	CHECK(vt_region_info(3, 2, buffer, sizeof(buffer)) == 200);
	CHECK(kernel.calls == 3);
	memcpy(&word, buffer + offsetof(struct vt_region_info, index), sizeof(word));
	CHECK(word == 2);
	memcpy(&word, buffer + 4, sizeof(word));
	CHECK(word == 0x11111111);
	/* More than there is room for: says so, and writes nothing beyond. */
	kernel.wanted = 4096;
	buffer[64] = 0x77;
	CHECK(vt_region_info(3, 2, buffer, 64) == 4096);
	CHECK(buffer[64] == 0x77);
	kernel.wanted = 0xffffffff;
	CHECK(vt_region_info(3, 2, buffer, sizeof(buffer)) == -EOVERFLOW);
	kernel.wanted = 0;
	CHECK(vt_device_info(3, buffer, sizeof(buffer)) == 20);
	CHECK(vt_device_info(3, buffer, 19) == -EINVAL);
	kernel.error = ENODEV;
	CHECK(vt_device_info(3, buffer, sizeof(buffer)) == -ENODEV);
}

static void interrupts_are_assigned_in_one_call(void)
{
	const int32_t fds[3] = { 7, -1, 9 };
	struct vt_irq_set *set = (void *)kernel.argument;

	forget();
	CHECK(vt_irq_assign(3, 2, 4, fds, 3) == 0);
	CHECK(set->argsz == 32 && set->index == 2 && set->start == 4 && set->count == 3);
	CHECK(set->flags == (VT_IRQ_DATA_EVENTFD | VT_IRQ_TRIGGER));
	CHECK(set->fds[0] == 7 && set->fds[1] == -1 && set->fds[2] == 9);
	CHECK(vt_irq_action(3, 1, 0, 0, VT_IRQ_TRIGGER) == 0);
	CHECK(set->argsz == 20 && set->count == 0);
	CHECK(set->flags == (VT_IRQ_DATA_NONE | VT_IRQ_TRIGGER));
	kernel.result = 2;
	CHECK(vt_irq_assign(3, 2, 0, fds, 3) == 2);
	CHECK(vt_irq_assign(3, 2, 0, fds, 5000) == -EINVAL);
}

static void mappings_carry_their_numbers(void)
{
	struct vt_dma_map *map = (void *)kernel.argument;
	struct vt_ioas_map *ioas = (void *)kernel.argument;
	uint64_t size = 0x3000;

	forget();
	CHECK(vt_type1_map(3, 0x7f0000000000, 0xfffff000, 0x3000, 1) == 0);
	CHECK(map->argsz == 32 && map->flags == 1 && map->vaddr == 0x7f0000000000);
	CHECK(map->iova == 0xfffff000 && map->size == 0x3000);
	CHECK(vt_type1_unmap(3, 0xfffff000, &size, 0) == 0 && size == 0x3000);
	CHECK(vt_iommufd_map(3, 5, 0x1000, 0x2000, 0x3000, 2) == 0);
	CHECK(ioas->flags == (VT_IOAS_MAP_FIXED_IOVA | VT_IOAS_MAP_WRITEABLE) && ioas->ioas_id == 5);
	kernel.error = ENOENT;
	CHECK(vt_iommufd_unmap(3, 5, 0x2000, &size) == -ENOENT && size == 0);
}

static void features_copy_back_and_are_bounded(void)
{
	uint8_t data[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };

	forget();
	CHECK(vt_device_feature(3, 1 << 16, data, sizeof(data)) == 0);
	CHECK(data[0] == 1 && data[7] == 8);
	CHECK(vt_device_feature(3, 1 << 18, NULL, 0) == 0);
	CHECK(vt_device_feature(3, 1 << 18, data, 5000) == -EINVAL);
	CHECK(vt_hot_reset(3, NULL, 0) == 0);
	CHECK(vt_hot_reset(3, NULL, 2000) == -EINVAL);
}

static void any_call_can_be_made_to_fail_once(void)
{
	uint32_t flags;

	forget();
	vt_fault_set(2, EIO);
	CHECK(vt_container_version(3) == 0);
	CHECK(vt_group_status(3, &flags) == -EIO);
	CHECK(vt_group_status(3, &flags) == 0);
	CHECK(kernel.calls == 2);
	CHECK(vt_fault_set(0, 0) == 3);
	CHECK(vt_group_status(3, &flags) == 0);
}

static int memory(uint64_t size)
{
	int fd = memfd_create("region", MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
	return fd;
}

static void windows_refuse_all_that_lies_outside(void)
{
	struct vt_window window;
	int fd = memory(3 * 4096);
	uint64_t top = UINT64_MAX;

	CHECK(vt_window_map(&window, fd, 4096, 0x100000, 8192, 3, 0) == 0);
	for (uint32_t width = 1; width <= 8; width *= 2) {
		CHECK(vt_window_allows(&window, 0x100000, width, 1));
		CHECK(vt_window_allows(&window, 0x102000 - width, width, 2));
		CHECK(!vt_window_allows(&window, 0x102000, width, 1));
		CHECK(!vt_window_allows(&window, 0x100000 - width, width, 1));
		CHECK(!vt_window_allows(&window, top - width + 1, width, 1));
		CHECK(width == 1 || !vt_window_allows(&window, 0x100001, width, 1));
	}
	CHECK(vt_window_check(&window, 0x100000, 2048, 4, 1) == VT_OK);
	CHECK(vt_window_check(&window, 0x100000, 2049, 4, 1) == VT_RANGE);
	CHECK(vt_window_check(&window, 0x100004, top / 4, 4, 1) == VT_RANGE);
	CHECK(vt_window_check(&window, 0x100002, 1, 4, 1) == VT_ALIGN);
	vt_window_block(&window, 1);
	CHECK(!vt_window_allows(&window, 0x100000, 4, 1));
	CHECK(vt_window_check(&window, 0x100000, 1, 4, 1) == VT_BLOCKED);
	vt_window_block(&window, 0);
	vt_store32(&window, 0x100010, 0x11223344);
	CHECK(vt_load32(&window, 0x100010) == 0x11223344 && vt_load8(&window, 0x100010) == 0x44);
	vt_window_unmap(&window);
	CHECK(vt_window_check(&window, 0x100000, 1, 4, 1) == VT_CLOSED);
	CHECK(!vt_window_allows(&window, 0, 1, 1));
	vt_window_unmap(&window);
	CHECK(vt_window_map(&window, fd, 1, 0, 4096, 3, 0) == -EINVAL);
	CHECK(vt_window_map(&window, fd, 0, 0, 0, 3, 0) == -EINVAL);
	CHECK(vt_window_map(&window, -1, 0, 0, 4096, 3, 0) == -EBADF);
	CHECK(vt_window_map(&window, fd, 0, 0, UINT64_MAX - 4095, 3, 0) == -ENOMEM);
	close(fd);
}

static void bulk_accesses_move_every_register_once(void)
{
	struct vt_window window;
	uint8_t in[64 + 1], out[64 + 1];
	int fd = memory(4096);

	CHECK(vt_window_map(&window, fd, 0, 0, 4096, 3, 0) == 0);
	for (unsigned i = 0; i < sizeof(in); i++)
		in[i] = (uint8_t)(i * 7 + 1);
	for (uint32_t width = 1; width <= 8; width *= 2) {
		memset(out, 0, sizeof(out));
		/* Buffers that are not aligned to the width, on purpose. */
		vt_window_write_many(&window, 64, width, 1, in + 1, 64 / width);
		vt_window_read_many(&window, 64, width, 1, out + 1, 64 / width);
		CHECK(!memcmp(in + 1, out + 1, 64));
		vt_window_read_many(&window, 64, width, 0, out + 1, 64 / width);
		CHECK(!memcmp(out + 1, out + 1 + 64 - width, width));
	}
	vt_window_unmap(&window);
	close(fd);
}

static void children_are_told_apart(void)
{
	struct vt_window window;
	int fd = memory(4096), status;
	pid_t child;

	vt_watch_forks();
	CHECK(vt_window_map(&window, fd, 0, 0, 4096, 3, 1 << 21) == 0);
	CHECK(((uintptr_t)window.base & ((1 << 21) - 1)) == 0);
	child = fork();
	if (child == 0)
		_exit(vt_window_check(&window, 0, 1, 4, 1) == VT_FORKED &&
				      !vt_window_allows(&window, 0, 4, 1)
			      ? 0
			      : 1);
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	CHECK(vt_window_allows(&window, 0, 4, 1));
	vt_window_unmap(&window);
	close(fd);
}

static void holes_in_a_child_are_plugged_and_nothing_else(void)
{
	void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t address = (uint64_t)(uintptr_t)page;

	CHECK(page != MAP_FAILED);
	CHECK(vt_memory_plug(address, 4096) == -EEXIST);
	CHECK(vt_memory_dont_fork(address, 4096) == 0);
	munmap(page, 4096);
	CHECK(vt_memory_plug(address, 4096) == 0);
	*(volatile char *)page = 1;
	munmap(page, 4096);
}

static void eventfds_count_and_time_out(void)
{
	uint64_t signals = 0, three = 3;
	int64_t none = 0, short_ns = 1000000, endless = -1, long_ns = 60000000000;
	int fd = vt_eventfd();

	CHECK(fd >= 0);
	CHECK(vt_eventfd_take(fd, &signals) == 0);
	CHECK(vt_eventfd_wait(fd, &none, 1000, &signals) == 0 && none == 0);
	CHECK(vt_eventfd_wait(fd, &short_ns, 0, &signals) == 0 && short_ns == 0);
	CHECK(write(fd, &three, sizeof(three)) == (ssize_t)sizeof(three));
	CHECK(vt_eventfd_wait(fd, &endless, 0, &signals) == 1 && signals == 3 && endless == -1);
	CHECK(write(fd, &three, sizeof(three)) == (ssize_t)sizeof(three));
	CHECK(vt_eventfd_wait(fd, &long_ns, 0, &signals) == 1);
	CHECK(long_ns > 0 && long_ns <= 60000000000);
	CHECK(vt_close(fd) == 0);
	CHECK(vt_eventfd_take(fd, &signals) == -EBADF);
	CHECK(vt_eventfd_wait(fd, &long_ns, 1000, &signals) == -EBADF);
}

static void caught(int number)
{
	(void)number;
}

static void an_interrupted_wait_tells_what_is_left(void)
{
	const struct itimerval soon = { .it_value = { .tv_usec = 20000 } };
	const struct sigaction action = { .sa_handler = caught };
	int64_t left = 60000000000;
	uint64_t signals;
	int fd = vt_eventfd();

	CHECK(fd >= 0 && !sigaction(SIGALRM, &action, NULL));
	CHECK(!setitimer(ITIMER_REAL, &soon, NULL));
	CHECK(vt_eventfd_wait(fd, &left, 0, &signals) == -EINTR);
	CHECK(left > 30000000000 && left < 60000000000 - 10000000);
	CHECK(vt_close(fd) == 0);
}

static void region_accesses_are_of_one_width(void)
{
	uint64_t value = 0;
	int fd = memory(4096);

	CHECK(vt_region_write(fd, 8, 8, 0x1122334455667788) == 0);
	CHECK(vt_region_read(fd, 8, 4, &value) == 0 && value == 0x55667788);
	CHECK(vt_region_read(fd, 15, 1, &value) == 0 && value == 0x11);
	CHECK(vt_region_read(fd, 8, 3, &value) == -EINVAL);
	CHECK(vt_region_read(fd, 4094, 4, &value) == -EIO);
	CHECK(vt_region_read(-1, 0, 4, &value) == -EBADF);
	close(fd);
}

int main(void)
{
	info_asks_again_with_what_the_kernel_needs();
	interrupts_are_assigned_in_one_call();
	mappings_carry_their_numbers();
	features_copy_back_and_are_bounded();
	any_call_can_be_made_to_fail_once();
	windows_refuse_all_that_lies_outside();
	bulk_accesses_move_every_register_once();
	children_are_told_apart();
	holes_in_a_child_are_plugged_and_nothing_else();
	eventfds_count_and_time_out();
	an_interrupted_wait_tells_what_is_left();
	region_accesses_are_of_one_width();
	return 0;
}

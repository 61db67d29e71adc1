/* Tests of nvme_load.c, and of what ends a load or a poll from outside. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#include "nvme/nvme_load.h"
#include "tests/nvme_controller.h"
#include "vfio/gate.h"

static struct vt_nvme_job job_of(uint64_t limit)
{
	return (struct vt_nvme_job){ .span = 4096, .iova = 0x100000, .stride = 4096, .seed = 42,
				     .limit = limit, .depth = 4, .batch = 1, .blocks = 8,
				     .bytes = 4096, .nsid = 1, .random = 1, .read_percent = 70 };
}

static void a_load_adds_up(int shadows, uint32_t batch)
{
	static struct vt_nvme_report report;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, shadows, 1, 1);
	struct vt_nvme_job job = job_of(2000);
	uint64_t sum = 0;

	job.batch = batch;
	CHECK(vt_nvme_run(queue, &job, &report) == 0);
	for (uint32_t i = 0; i < VT_NVME_BUCKETS; i++)
		sum += report.histogram[i];
	CHECK(sum == 2000 && report.reads + report.writes == 2000 && device.fetched == 2000);
	CHECK(report.reads > 1200 && report.reads < 1600);
	CHECK(report.latency_min_ns <= report.latency_sum_ns / 2000);
	CHECK(report.latency_max_ns >= report.latency_sum_ns / 2000);
	CHECK(report.tail_writes <= 2000 / batch + 4 && report.failed == 0);
	job.limit = 0;
	job.runtime_ns = 50000000;
	CHECK(vt_nvme_run(queue, &job, &report) == 0);
	CHECK(report.elapsed_ns >= 49000000 && report.reads > 0);
	end(&device, queue);
}

static void a_load_stops_at_the_first_failure(void)
{
	static struct vt_nvme_report report;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 1);
	struct vt_nvme_job job = job_of(1000000);

	device.status = 0x80;
	CHECK(vt_nvme_run(queue, &job, &report) == 0);
	CHECK(report.failed >= 1 && report.failed <= 4 && report.first_status == 0x80);
	end(&device, queue);
}

static void *halt_soon(void *queue)
{
	usleep(20000);
	vt_nvme_halt(queue);
	return NULL;
}

static void *stop_soon(void *queue)
{
	struct vt_nvme_done done;

	usleep(20000);
	CHECK(poll_once(queue, &done, 1, 1, 0) == -EBUSY);
	CHECK(vt_nvme_stop(queue) == -EBUSY);
	vt_nvme_halt(queue);
	return NULL;
}

static void halting_and_stopping(void)
{
	static struct vt_nvme_report report;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 1);
	struct vt_nvme_job job = job_of(0);
	struct vt_nvme_io io = read_of(1);
	struct vt_nvme_done done;
	pthread_t thread;

	job.runtime_ns = 60000000000u;
	CHECK(pthread_create(&thread, NULL, halt_soon, queue) == 0);
	CHECK(vt_nvme_run(queue, &job, &report) == 0);
	pthread_join(thread, NULL);
	CHECK(report.elapsed_ns < 30000000000u);
	CHECK(pthread_create(&thread, NULL, stop_soon, queue) == 0);
	CHECK(vt_nvme_run(queue, &job, &report) == 0);
	pthread_join(thread, NULL);
	CHECK(vt_nvme_stop(queue) == 0);
	CHECK(vt_nvme_stop(queue) == 0);
	CHECK(vt_nvme_submit(queue, &io, 1) == -ESHUTDOWN);
	CHECK(poll_once(queue, &done, 1, 1, 0) == -ESHUTDOWN);
	end(&device, queue);
}

static void silence_ends_a_load(void)
{
	static struct vt_nvme_report report;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 1);
	struct vt_nvme_job job = job_of(10);

	device.mute = 1;
	CHECK(vt_nvme_run(queue, &job, &report) == -ETIMEDOUT);
	CHECK(vt_nvme_run(queue, &job, &report) == -ESHUTDOWN);
	end(&device, queue);
}

static void *shut_soon(void *gate)
{
	usleep(20000);
	vt_gate_set(gate, 0);
	while (vt_gate_is_busy(gate))
		usleep(10);
	return NULL;
}

/* Whoever shuts the gate finds nobody at the doorbells, however long the poll would have taken. */
static void a_gate_that_shuts_ends_a_poll_and_a_load(void)
{
	static struct vt_nvme_report report;
	static struct vt_gate gate;
	struct device device;
	struct vt_nvme_queue *queue, *other = start(&device, 0, 0, 0);
	struct vt_nvme_layout layout = layout_of(&device);
	struct vt_nvme_io io = read_of(1);
	struct vt_nvme_done done;
	struct vt_nvme_job job = job_of(10);
	pthread_t thread;

	layout.gate = (uintptr_t)&gate;
	CHECK(vt_nvme_new(&layout, &queue) == 0);
	vt_gate_set(&gate, 1);
	CHECK(vt_nvme_submit(queue, &io, 1) == 1);
	CHECK(pthread_create(&thread, NULL, shut_soon, &gate) == 0);
	CHECK(poll_once(queue, &done, 1, 1, 60000000000u) == 0);
	pthread_join(thread, NULL);
	work(&device);
	vt_gate_set(&gate, 1);
	CHECK(poll_once(queue, &done, 1, 1, 1000000) == 1);
	CHECK(pthread_create(&thread, NULL, shut_soon, &gate) == 0);
	CHECK(vt_nvme_run(queue, &job, &report) == -EACCES);
	pthread_join(thread, NULL);
	vt_nvme_free(other);
	end(&device, queue);
}

static void *abandon_soon(void *queue)
{
	usleep(20000);
	vt_nvme_abandon(queue);
	return NULL;
}

static void giving_up_does_not_wait_for_what_is_out(void)
{
	static struct vt_nvme_report report;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 1);
	struct vt_nvme_job job = job_of(10);
	pthread_t thread;

	device.mute = 1;
	CHECK(pthread_create(&thread, NULL, abandon_soon, queue) == 0);
	CHECK(vt_nvme_run(queue, &job, &report) == -ETIMEDOUT);
	pthread_join(thread, NULL);
	CHECK(report.elapsed_ns < 2500000000u);
	end(&device, queue);
}

static void buckets_are_close_and_monotonic(void)
{
	for (uint64_t ns = 0; ns < 1u << 20; ns += 1 + ns / 1000) {
		uint32_t bucket = vt_nvme_bucket(ns);

		CHECK(vt_nvme_bucket_floor(bucket) <= ns);
		CHECK(bucket + 1 == VT_NVME_BUCKETS || vt_nvme_bucket_floor(bucket + 1) > ns);
		CHECK(ns - vt_nvme_bucket_floor(bucket) <= ns / 64);
	}
	CHECK(vt_nvme_bucket(UINT64_MAX) == VT_NVME_BUCKETS - 1);
}

void loads_hold(void)
{
	for (uint32_t batch = 1; batch <= 4; batch++)
		a_load_adds_up(batch % 2, batch);
	a_load_stops_at_the_first_failure();
	halting_and_stopping();
	silence_ends_a_load();
	giving_up_does_not_wait_for_what_is_out();
	a_gate_that_shuts_ends_a_poll_and_a_load();
	buckets_are_close_and_monotonic();
}

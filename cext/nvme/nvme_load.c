#define _GNU_SOURCE
#include "nvme/nvme_load.h"

#include <stdlib.h>
#include <string.h>

#include "nvme/nvme_ring.h"

#define OPCODE_WRITE 0x01u
#define OPCODE_READ 0x02u
#ifndef VT_NVME_SILENCE_NS
#define VT_NVME_SILENCE_NS 10000000000u
#endif

uint32_t vt_nvme_bucket(uint64_t ns)
{
	uint32_t power, bucket;

	if (ns < 64)
		return (uint32_t)ns;
	power = 63 - (uint32_t)__builtin_clzll(ns);
	bucket = (power - 5) * 64 + (uint32_t)(ns >> (power - 6)) - 64;
	return bucket < VT_NVME_BUCKETS ? bucket : VT_NVME_BUCKETS - 1;
}

uint64_t vt_nvme_bucket_floor(uint32_t bucket)
{
	if (bucket < 128)
		return bucket;
	return (uint64_t)(bucket % 64 + 64) << (bucket / 64 - 1);
}

/* The state of a load: which slots wait to be sent, and what the next command works on. */
struct load {
	struct vt_nvme_queue *q;
	const struct vt_nvme_job *job;
	struct vt_nvme_report *report;
	struct command *patterns; /* one a slot, all but opcode and place */
	uint16_t *idle;
	uint32_t idle_count;
	uint64_t runs, next_run, issued, random;
	struct vt_nvme_done held;
	uint64_t held_ticks;
	int holding;
};

static uint64_t draw(struct load *load)
{
	/* Marsaglia's xorshift64*, good enough to spread reads and cheap. */
	load->random ^= load->random >> 12;
	load->random ^= load->random << 25;
	load->random ^= load->random >> 27;
	return load->random * 0x2545f4914f6cdd1du;
}

static uint32_t send(struct load *load, uint64_t now)
{
	struct vt_nvme_queue *q = load->q;
	const struct vt_nvme_job *job = load->job;
	uint32_t sent = 0;

	while (load->idle_count && (!job->limit || load->issued < job->limit)) {
		uint16_t index = load->idle[--load->idle_count];
		struct command *command = &q->commands[q->tail];
		uint64_t drawn = draw(load), run;
		int reading = (drawn & 0xffff) * 100 < (uint64_t)job->read_percent << 16;

		if (job->random) {
			run = (uint64_t)(((unsigned __int128)drawn * load->runs) >> 64);
		} else {
			run = load->next_run;
			load->next_run = run + 1 == load->runs ? 0 : run + 1;
		}
		*command = load->patterns[index];
		command->cid = htole16(q->slots[index].cid);
		command->opcode = reading ? OPCODE_READ : OPCODE_WRITE;
		command->lba = htole64(job->first_lba + run * job->blocks);
		take_index(q, index, reading, now);
		load->issued++;
		sent++;
	}
	if (sent)
		ring(&q->tail_bell, q->tail);
	return sent;
}

static void record_held(struct load *load)
{
	struct vt_nvme_report *report = load->report;
	const struct vt_nvme_done *done = &load->held;
	uint64_t latency_ns;

	if (!load->holding)
		return;
	load->holding = 0;
	latency_ns = to_ns(load->held_ticks);
	if (done->status) {
		if (!report->first_status)
			report->first_status = done->status;
	} else if (done->tag) {
		report->reads++;
	} else {
		report->writes++;
	}
	report->latency_sum_ns += latency_ns;
	if (latency_ns < report->latency_min_ns)
		report->latency_min_ns = latency_ns;
	if (latency_ns > report->latency_max_ns)
		report->latency_max_ns = latency_ns;
	report->histogram[vt_nvme_bucket(latency_ns)]++;
}

/* Takes what is done and records it, but for the last one: that waits in `held` until the next
 * commands are on their way, so that at depth 1 the controller is not kept waiting for it. */
static int gather(struct load *load, uint64_t now)
{
	struct vt_nvme_queue *q = load->q;
	uint64_t started;
	uint16_t index;

	while (waiting(q)) {
		int result;

		record_held(load);
		result = take(q, &load->held, &started, &index);
		if (result)
			return result;
		load->held_ticks = now - started;
		load->holding = 1;
		load->report->failed += load->held.status != 0;
		load->idle[load->idle_count++] = index;
	}
	tell_head(q);
	return 0;
}

/* Keeps the queue filled until the job ends, then drains it. */
static int drive(struct load *load)
{
	struct vt_nvme_queue *q = load->q;
	const struct vt_nvme_job *job = load->job;
	uint64_t now = ticks();
	uint64_t end = job->runtime_ns ? now + to_ticks(job->runtime_ns) : UINT64_MAX;
	uint64_t silence = to_ticks(VT_NVME_SILENCE_NS), heard = now;
	int ending = 0, result;

	send(load, now);
	while (q->in_flight) {
		/* Asked to end again and again it still waits for what is in flight, but not longer. */
		if (!await(q, heard + silence) &&
		    (halted(q) != HALTED || barred(q) || ticks() >= heard + silence))
			return barred(q) ? -EACCES : -ETIMEDOUT;
		now = ticks();
		if (waiting(q))
			heard = now;
		result = gather(load, now);
		if (result)
			return result;
		ending |= now >= end || halted(q) || load->report->failed;
		if (!ending && (load->idle_count >= job->batch || !q->in_flight))
			send(load, ticks());
		record_held(load);
		/* A halted load still waits for what is in flight: its buffers are the device's. */
		if (ending) {
			int asked = HALTED;

			__atomic_compare_exchange_n(&q->halted, &asked, 0, 0, __ATOMIC_RELAXED,
						    __ATOMIC_RELAXED);
		}
	}
	return 0;
}

static int prepare(struct load *load)
{
	struct vt_nvme_queue *q = load->q;
	const struct vt_nvme_job *job = load->job;
	struct vt_nvme_io io = { .nsid = job->nsid, .blocks = job->blocks, .bytes = job->bytes };

	if (!job->depth || job->depth > q->depth || !job->batch || job->batch > job->depth ||
	    !job->blocks || !job->bytes || job->span < job->blocks || job->read_percent > 100 ||
	    (!job->runtime_ns && !job->limit))
		return -EINVAL;
	load->runs = job->span / job->blocks;
	load->random = job->seed ? job->seed : 1;
	load->patterns = calloc(job->depth, sizeof(*load->patterns));
	load->idle = calloc(job->depth, sizeof(*load->idle));
	if (!load->patterns || !load->idle)
		return -ENOMEM;
	for (uint32_t i = 0; i < job->depth; i++) {
		uint16_t index = (uint16_t)(job->depth - 1 - i);

		load->idle[load->idle_count++] = index;
		io.iova = job->iova + index * job->stride;
		if (vt_nvme_make(q, index, &io, &load->patterns[index]))
			return -EINVAL;
	}
	return 0;
}

int vt_nvme_run(struct vt_nvme_queue *q, const struct vt_nvme_job *job,
		struct vt_nvme_report *report)
{
	struct load load = { .q = q, .job = job, .report = report };
	uint64_t start, tail_writes, head_writes;
	int result = vt_nvme_enter(q);

	if (result)
		return result;
	memset(report, 0, sizeof(*report));
	report->latency_min_ns = UINT64_MAX;
	/* The load uses the identifiers 0 ... depth - 1 past the stack, whose order is then as it
	 * was: so none may be out. */
	result = q->in_flight ? -EBUSY : prepare(&load);
	if (!result) {
		tail_writes = q->tail_bell.writes;
		head_writes = q->head_bell.writes;
		start = vt_clock_ns();
		result = drive(&load);
		report->elapsed_ns = vt_clock_ns() - start;
		report->tail_writes = q->tail_bell.writes - tail_writes;
		report->head_writes = q->head_bell.writes - head_writes;
	}
	__atomic_store_n(&q->halted, 0, __ATOMIC_RELAXED);
	free(load.patterns);
	free(load.idle);
	if (result == -EPROTO || result == -ETIMEDOUT || result == -EACCES)
		__atomic_store_n(&q->stopped, 1, __ATOMIC_RELEASE); /* and busy: commands are out that the stack does not know of */
	return vt_nvme_leave(q, result);
}

/* A gate before memory-mapped registers: whoever shuts it knows that nobody is beyond it.
 *
 * A window has one. A loop in C that touches the window without the interpreter's lock passes it
 * first, looks at it in every round, and leaves. Whoever is about to make the registers unreachable
 * (memory decode off, a sleeping device, the window unmapped) shuts it and waits until `inside` is
 * 0: no access follows. All functions are inline, so that both extensions can use one gate; the
 * object that holds it is pinned by whoever keeps its address (`Window.pin` in types_module.c).
 */
#ifndef VT_GATE_H
#define VT_GATE_H

#include <stdint.h>

struct vt_gate {
	uint32_t open;   /* 0: no access now */
	uint32_t inside; /* how many threads are between enter and leave */
};

/* 1 if the caller is inside now and may access until vt_gate_leave; 0 if the gate is shut, and then
 * there is nothing to leave. Never waits. */
static inline int vt_gate_enter(struct vt_gate *gate)
{
	__atomic_add_fetch(&gate->inside, 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&gate->open, __ATOMIC_SEQ_CST))
		return 1;
	__atomic_sub_fetch(&gate->inside, 1, __ATOMIC_RELEASE);
	return 0;
}

static inline void vt_gate_leave(struct vt_gate *gate)
{
	__atomic_sub_fetch(&gate->inside, 1, __ATOMIC_RELEASE);
}

/* For those inside: 0 once somebody waits for them to leave. Asked in every round of a loop. */
static inline int vt_gate_is_open(const struct vt_gate *gate)
{
	return __atomic_load_n(&gate->open, __ATOMIC_RELAXED) != 0;
}

static inline void vt_gate_set(struct vt_gate *gate, int open)
{
	__atomic_store_n(&gate->open, open ? 1u : 0u, __ATOMIC_SEQ_CST);
}

static inline int vt_gate_is_busy(const struct vt_gate *gate)
{
	return __atomic_load_n(&gate->inside, __ATOMIC_ACQUIRE) != 0;
}

#endif

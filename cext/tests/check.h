/* What the test programs in C have in common. */
#ifndef VT_TESTS_CHECK_H
#define VT_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>

/* End the program, saying what was wrong and where, unless `condition` holds. */
#define CHECK(condition)                                                                         \
	do {                                                                                     \
		if (!(condition)) {                                                              \
			fprintf(stderr, "%s:%d: %s\n", __func__, __LINE__, #condition);          \
			exit(1);                                                                 \
		}                                                                                \
	} while (0)

#endif

/* Functions that are compiled for AVX-512, AVX2 and the baseline; the loader picks at start. Levels need gcc 12. */

#ifndef MAKEREADY_DISPATCH_H
#define MAKEREADY_DISPATCH_H

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__linux__)
#define DISPATCHED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DISPATCHED
#endif

#endif

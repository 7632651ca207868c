/* llmhost: lab/gpu/programs/libcuda.c - stand-in for libcuda.so.1 on lab hosts: it says whether a driver of its own
 * version is loaded and its devices open, and computes nothing. -DVERSION="580.178.04" -DCUDA_NUMBER=13000 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define RUN "/run/llmhost-lab/"

static int count_lines(const char *path) {
    FILE *file = fopen(path, "r");
    int lines = 0, character;
    if (!file) return 0;
    while ((character = fgetc(file)) != EOF) lines += character == '\n';
    fclose(file);
    return lines;
}

static int first_word(const char *path, char *word) { /* word holds 64 characters */
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    int found = fscanf(file, "%63s", word);
    fclose(file);
    return found == 1;
}

static int opens(const char *path) {
    int file = open(path, O_RDWR);
    if (file >= 0) close(file);
    return file >= 0;
}

static int fabric_manager_runs(void) {
    int file = open(RUN "fabric.lock", O_RDONLY);
    int held = flock(file, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    close(file);
    return held;
}

int cuInit(unsigned int flags) {
    char loaded[64], fabric[64] = "";
    if (flags) return 1;                                                                          /* INVALID_VALUE */
    if (!first_word("/sys/module/nvidia/version", loaded) && !first_word(RUN "module/nvidia/version", loaded))
        return 100;                                                                               /* NO_DEVICE */
    if (strcmp(loaded, VERSION)) return 803;                                                      /* DRIVER_MISMATCH */
    if (!count_lines(RUN "usable")) return 100;                                                   /* NO_DEVICE */
    if (!opens("/dev/nvidiactl") || !opens("/dev/nvidia0") || !opens("/dev/nvidia-uvm")) return 999; /* UNKNOWN */
    first_word(RUN "fabric", fabric);
    if (!strcmp(fabric, "required") && !fabric_manager_runs()) return 802;                        /* NOT_READY */
    return 0;
}

int cuDriverGetVersion(int *version) {
    *version = CUDA_NUMBER;
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = count_lines(RUN "usable");
    return 0;
}

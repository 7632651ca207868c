/* llmhost: lab/gpu/programs/nvidia_smi.c - stand-in for nvidia-smi on lab hosts: recorded values, told or refused as
 * the real one tells or refuses them. Static, so that it runs in any container. -DVERSION="580.178.04" -DCUDA="13.0" */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define RUN "/run/llmhost-lab/"
#define MAX 64

static char *slurp(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) return NULL;
    char *text = calloc(1, 1 << 20);
    size_t length = fread(text, 1, (1 << 20) - 1, file);
    text[length] = 0;
    fclose(file);
    return text;
}

static int locked(const char *path) { /* a daemon holds it for as long as it lives */
    int file = open(path, O_RDONLY);
    if (file < 0) return 0;
    int held = flock(file, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    close(file);
    return held;
}

static const char *persistence(void) { return locked(RUN "persistence.lock") ? "Enabled" : "Disabled"; }

static int fabric_needed(void) {
    char *text = slurp(RUN "fabric");
    return text && strncmp(text, "required", 8) == 0;
}

static const char *token(const char *name) {
    if (!strcmp(name, "DRIVER")) return VERSION;
    if (!strcmp(name, "CUDA")) return CUDA;
    if (!strcmp(name, "PERSISTENCE")) return persistence();
    if (!strcmp(name, "FABRIC")) return !fabric_needed() ? "N/A" : locked(RUN "fabric.lock") ? "Completed" : "In Progress";
    if (!strcmp(name, "FABRIC_STATUS")) return fabric_needed() && locked(RUN "fabric.lock") ? "Success" : "N/A";
    return "N/A";
}

static void tell_xml(void) {
    char *text = slurp(RUN "smi.xml");
    for (char *at = text; at && *at; at++) {
        char *end = *at == '@' ? strchr(at + 1, '@') : NULL;
        if (!end) {
            putchar(*at);
            continue;
        }
        *end = 0;
        fputs(token(at + 1), stdout);
        at = end;
    }
}

static int split(char *line, char separator, char **parts) {
    int count = 0;
    for (char *at = line; at && count < MAX; count++) {
        parts[count] = at;
        at = strchr(at, separator);
        if (at) *at++ = 0;
    }
    return count;
}

static int rows(char **names, int *columns, char *cells[][MAX]) {
    char *text = slurp(RUN "gpus.tsv"), *lines[MAX];
    int found = split(text, '\n', lines), count = 0;
    *columns = split(lines[0], '\t', names);
    for (int line = 1; line < found; line++)
        if (*lines[line]) split(lines[line], '\t', cells[count++]);
    return count;
}

static const char *cell(const char *field, char **names, int columns, char **row) {
    if (!strcmp(field, "driver_version")) return VERSION;
    if (!strcmp(field, "persistence_mode")) return persistence();
    for (int column = 0; column < columns; column++)
        if (!strcmp(field, names[column])) return row[column];
    return NULL;
}

static int query(char *wanted, const char *format) {
    char *names[MAX], *cells[MAX][MAX], *fields[MAX];
    int columns, count = rows(names, &columns, cells), asked = split(wanted, ',', fields);
    for (int field = 0; field < asked; field++) {
        while (*fields[field] == ' ') fields[field]++;
        if (!cell(fields[field], names, columns, cells[0])) {
            printf("Field \"%s\" is not a valid field to query.\n", fields[field]);
            return 2;
        }
    }
    for (int row = strstr(format, "noheader") ? 0 : -1; row < count; row++)
        for (int field = 0; field < asked; field++) {
            const char *value = row < 0 ? fields[field] : cell(fields[field], names, columns, cells[row]);
            char plain[256];
            snprintf(plain, sizeof plain, "%s", value);
            char *unit = strstr(format, "nounits") && row >= 0 ? strstr(plain, " MiB") ?: strstr(plain, " W") : NULL;
            if (unit) *unit = 0;
            printf("%s%s", plain, field + 1 < asked ? ", " : "\n");
        }
    return 0;
}

static void list(int table) {
    char *names[MAX], *cells[MAX][MAX];
    int columns, count = rows(names, &columns, cells);
    if (table) printf("| NVIDIA-SMI %s   Driver Version: %s   CUDA Version: %s   (stand-in) |\n", VERSION, VERSION, CUDA);
    for (int row = 0; row < count; row++) {
        const char *name = cell("name", names, columns, cells[row]);
        if (table) printf("| %3d  %s  %s |\n", row, name, cell("memory.total", names, columns, cells[row]));
        else printf("GPU %d: %s (UUID: %s)\n", row, name, cell("uuid", names, columns, cells[row]));
    }
}

static int ready(void) { /* 0, or the exit code with the words told */
    char *loaded = slurp("/sys/module/nvidia/version");
    if (!loaded) loaded = slurp(RUN "module/nvidia/version"); /* in a container /sys is the machine's own */
    if (!loaded) {
        puts("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
             "Make sure that the latest NVIDIA driver is installed and running.\n");
        return 9;
    }
    loaded[strcspn(loaded, "\n")] = 0;
    if (strcmp(loaded, VERSION)) {
        printf("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: %.7s\n", VERSION);
        return 18;
    }
    int control = open("/dev/nvidiactl", O_RDWR), first = open("/dev/nvidia0", O_RDWR);
    if (control < 0 || first < 0) {
        puts("Failed to initialize NVML: Unknown Error");
        return 255;
    }
    char *usable = slurp(RUN "usable");
    if (!usable || !*usable) {
        puts("No devices were found");
        return 6;
    }
    return 0;
}

int main(int count, char **words) {
    int lists = 0, everything = 0, xml = 0;
    char *wanted = NULL;
    const char *format = "";
    for (int word = 1; word < count; word++) {
        if (!strcmp(words[word], "-L") || !strcmp(words[word], "--list-gpus")) lists = 1;
        else if (!strcmp(words[word], "-q") || !strcmp(words[word], "--query")) everything = 1;
        else if (!strcmp(words[word], "-x") || !strcmp(words[word], "--xml-format")) xml = 1;
        else if (!strncmp(words[word], "--query-gpu=", 12)) wanted = words[word] + 12;
        else if (!strncmp(words[word], "--format=", 9)) format = words[word] + 9;
        else {
            printf("Invalid combination of input arguments (the lab's stand-in knows -L, -q -x, --query-gpu=): %s\n", words[word]);
            return 2;
        }
    }
    int refused = ready();
    if (refused) return refused;
    if (lists) list(0);
    else if (everything && xml) tell_xml();
    else if (wanted) return query(wanted, format);
    else list(1);
    return 0;
}

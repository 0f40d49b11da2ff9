// A libnvidia-ml.so.1 with two GPUs, for tests of what reads the real one. The second one has the
// readings of the first, a name and a UUID of its own.
//
// Init and shutdown add a line to the file FAKE_NVML_STATE.calls. Every call reads the file named
// by FAKE_NVML_STATE. Its lines:
//   NAME VALUE            a reading, e.g. "memory_used 1073741824"
//   fault SYMBOL CODE     that function returns the code; "fault * 15" is all of them
//   process PID BYTES     a compute process
//   xid CODE              an event; each line is delivered once
//   hang SYMBOL MS        that function takes so long

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef void* Device;
enum { kSuccess = 0, kNotSupported = 3, kNotFound = 6, kInsufficientSize = 7, kTimeout = 10 };
static int gpu, second, mig;  // their addresses are the handles

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned version; unsigned sensor; int temperature; } Temperature;
typedef struct {
  unsigned pid;
  unsigned long long used;
  unsigned gpu_instance, compute_instance;
} Process;
typedef struct {
  Device device;
  unsigned long long type, data;
  unsigned gpu_instance, compute_instance;
} Event;

static void sleep_ms(long ms) {
  struct timespec time = {ms / 1000, ms % 1000 * 1000000};
  nanosleep(&time, NULL);
}

// Calls `visit` for every line; stops where it returns nonzero, and returns that.
static long each_line(long (*visit)(const char* line, void* data), void* data) {
  const char* path = getenv("FAKE_NVML_STATE");
  FILE* file = path ? fopen(path, "r") : NULL;
  char line[256];
  long result = 0;
  while (file && !result && fgets(line, sizeof line, file)) result = visit(line, data);
  if (file) fclose(file);
  return result;
}

struct Lookup { const char* name; unsigned long long value; int found; };

static long find_value(const char* line, void* data) {
  struct Lookup* wanted = data;
  char name[128];
  unsigned long long value;
  if (sscanf(line, "%127s %llu", name, &value) == 2 && !strcmp(name, wanted->name)) {
    wanted->value = value;
    wanted->found = 1;
    return 1;
  }
  return 0;
}

static int reading(const char* name, unsigned long long* value) {
  struct Lookup wanted = {name, 0, 0};
  each_line(find_value, &wanted);
  *value = wanted.value;
  return wanted.found ? kSuccess : kNotSupported;
}

static long find_fault(const char* line, void* data) {
  char symbol[128];
  long number;
  const char* wanted = data;
  if (sscanf(line, "hang %127s %ld", symbol, &number) == 2 && !strcmp(symbol, wanted))
    sleep_ms(number);
  if (sscanf(line, "fault %127s %ld", symbol, &number) == 2 &&
      (!strcmp(symbol, wanted) || (!strcmp(symbol, "*") && strcmp(wanted, "nvmlShutdown"))))
    return number;
  return 0;
}

#define CHECK_FAULT()                                               \
  do {                                                              \
    long fault = each_line(find_fault, (void*)__func__);            \
    if (fault) return (int)fault;                                   \
  } while (0)

// A function whose last parameter receives one reading, divided by nothing.
#define READING(SYMBOL, PARAMETERS, TYPE, NAME) \
  int SYMBOL PARAMETERS {                       \
    unsigned long long value;                   \
    CHECK_FAULT();                              \
    int status = reading(NAME, &value);         \
    *out = (TYPE)value;                         \
    return status;                              \
  }

static void note_call(const char* name) {
  char path[512];
  snprintf(path, sizeof path, "%s.calls", getenv("FAKE_NVML_STATE"));
  FILE* file = fopen(path, "a");
  if (!file) return;
  fprintf(file, "%s\n", name);
  fclose(file);
}

int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  CHECK_FAULT();
  note_call("init");
  return kSuccess;
}

int nvmlShutdown(void) {
  CHECK_FAULT();
  note_call("shutdown");
  return kSuccess;
}

const char* nvmlErrorString(int code) {
  switch (code) {
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 9: return "Driver Not Loaded";
    case 13: return "Function Not Found";
    case 15: return "GPU is lost";
    default: return "Unknown Error";
  }
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device* out) {
  CHECK_FAULT();
  *out = index ? &second : &gpu;
  return index < 2 ? kSuccess : 2;  // invalid argument
}

int nvmlDeviceGetCount_v2(unsigned* out) {
  CHECK_FAULT();
  *out = 2;
  return kSuccess;
}

int nvmlDeviceGetUUID(Device device, char* uuid, unsigned length) {
  CHECK_FAULT();
  snprintf(uuid, length, device == &second ? "GPU-5678" : "GPU-1234");
  return kSuccess;
}

int nvmlDeviceGetHandleByUUID(const char* uuid, Device* out) {
  CHECK_FAULT();
  *out = &mig;
  return strcmp(uuid, "MIG-1234") ? kNotFound : kSuccess;
}

int nvmlDeviceGetName(Device device, char* name, unsigned length) {
  CHECK_FAULT();
  const char* suffix = device == &mig ? " MIG 1g.10gb" : device == &second ? " 2" : "";
  snprintf(name, length, "Fake GPU%s", suffix);
  return kSuccess;
}

int nvmlDeviceGetMigMode(Device device, unsigned* current, unsigned* pending) {
  unsigned long long value;
  (void)device;
  CHECK_FAULT();
  int status = reading("mig", &value);
  *current = *pending = (unsigned)value;
  return status;
}

int nvmlDeviceGetMaxMigDeviceCount(Device device, unsigned* out) {
  (void)device;
  CHECK_FAULT();
  *out = 2;
  return kSuccess;
}

// The first place is empty, as it may be on a real GPU.
int nvmlDeviceGetMigDeviceHandleByIndex(Device device, unsigned index, Device* out) {
  (void)device;
  CHECK_FAULT();
  *out = &mig;
  return index == 1 ? kSuccess : kNotFound;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device device, Device* out) {
  CHECK_FAULT();
  *out = &gpu;
  return device == &mig ? kSuccess : 2;  // invalid argument
}

int nvmlDeviceGetMemoryInfo_v2(Device device, MemoryV2* out) {
  CHECK_FAULT();
  int status = reading(device == &mig ? "mig_memory_total" : "memory_total", &out->total);
  reading(device == &mig ? "mig_memory_used" : "memory_used", &out->used);
  out->reserved = 0;
  out->free = out->total - out->used;
  return status;
}

int nvmlDeviceGetMemoryInfo(Device device, Memory* out) {
  (void)device;
  CHECK_FAULT();
  int status = reading("memory_total", &out->total);
  reading("memory_used", &out->used);
  out->free = out->total - out->used;
  return status;
}

struct Processes { Process* out; unsigned capacity, count; };

static long add_process(const char* line, void* data) {
  struct Processes* all = data;
  Process process = {0, 0, 0, 0};
  if (sscanf(line, "process %u %llu", &process.pid, &process.used) != 2) return 0;
  if (all->count < all->capacity) all->out[all->count] = process;
  all->count++;
  return 0;
}

static int list_processes(unsigned* count, Process* out) {
  struct Processes all = {out, out ? *count : 0, 0};
  each_line(add_process, &all);
  int fits = all.count <= all.capacity;
  *count = all.count;
  return fits ? kSuccess : kInsufficientSize;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device device, unsigned* count, Process* out) {
  (void)device;
  CHECK_FAULT();
  return list_processes(count, out);
}

int nvmlDeviceGetComputeRunningProcesses_v2(Device device, unsigned* count, Process* out) {
  (void)device;
  CHECK_FAULT();
  return list_processes(count, out);
}

int nvmlDeviceGetUtilizationRates(Device device, Utilization* out) {
  unsigned long long value;
  CHECK_FAULT();
  int status = device == &mig ? kNotSupported : reading("utilization", &value);
  if (!status) out->gpu = out->memory = (unsigned)value;
  return status;
}

int nvmlDeviceGetTemperatureV(Device device, Temperature* out) {
  unsigned long long value;
  (void)device;
  CHECK_FAULT();
  int status = reading("temperature", &value);
  out->temperature = (int)value;
  return status;
}

int nvmlDeviceGetTotalEccErrors(Device device, unsigned kind, unsigned counter,
                                unsigned long long* out) {
  (void)device, (void)counter;
  CHECK_FAULT();
  return reading(kind == 1 ? "ecc_uncorrected" : "ecc_corrected", out);
}

READING(nvmlDeviceGetTemperature, (Device d, unsigned sensor, unsigned* out), unsigned, "temperature")
READING(nvmlDeviceGetTemperatureThreshold, (Device d, unsigned kind, unsigned* out), unsigned, "temperature_limit")
READING(nvmlDeviceGetClockInfo, (Device d, unsigned kind, unsigned* out), unsigned, "clock")
READING(nvmlDeviceGetMaxClockInfo, (Device d, unsigned kind, unsigned* out), unsigned, "max_clock")
READING(nvmlDeviceGetCurrentClocksEventReasons, (Device d, unsigned long long* out), unsigned long long, "throttle")
READING(nvmlDeviceGetCurrentClocksThrottleReasons, (Device d, unsigned long long* out), unsigned long long, "throttle")
READING(nvmlDeviceGetPowerUsage, (Device d, unsigned* out), unsigned, "power_mw")
READING(nvmlDeviceGetEnforcedPowerLimit, (Device d, unsigned* out), unsigned, "power_limit_mw")
READING(nvmlDeviceGetTotalEnergyConsumption, (Device d, unsigned long long* out), unsigned long long, "energy_mj")

int nvmlEventSetCreate(Device* out) { CHECK_FAULT(); *out = &gpu; return kSuccess; }
int nvmlEventSetFree(Device set) { (void)set; CHECK_FAULT(); return kSuccess; }

int nvmlDeviceRegisterEvents(Device device, unsigned long long types, Device set) {
  (void)device, (void)types, (void)set;
  CHECK_FAULT();
  return kSuccess;
}

struct Xids { int skip; unsigned long long code; };

static long find_xid(const char* line, void* data) {
  struct Xids* wanted = data;
  return sscanf(line, "xid %llu", &wanted->code) == 1 && wanted->skip-- == 0;
}

int nvmlEventSetWait_v2(Device set, Event* out, unsigned timeout_ms) {
  static int num_delivered = 0;
  (void)set;
  CHECK_FAULT();
  for (unsigned waited_ms = 0; waited_ms < timeout_ms; waited_ms += 10) {
    struct Xids next = {num_delivered, 0};
    if (each_line(find_xid, &next)) {
      num_delivered++;
      memset(out, 0, sizeof *out);
      out->device = &gpu;
      out->type = 8;
      out->data = next.code;
      return kSuccess;
    }
    sleep_ms(10);
  }
  return kTimeout;
}

// A stand-in for libcuda: records what it is asked, returns the error codes that a test configures.
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

static std::mutex lock;
static std::string record;
static std::map<std::string, int> codes;
static std::map<std::string, size_t> kernels;  // name -> bytes of its one argument
static std::map<size_t, std::set<std::string>> modules;
static std::vector<std::string> names;  // of function handles
static thread_local std::vector<size_t> contexts;
static thread_local int capture_mode = 0;
static size_t loaded = 0;

static int done(const std::string& call, const std::string& details = "") {
    std::lock_guard<std::mutex> guard(lock);
    record += call + details + "\n";
    auto found = codes.find(call);
    return found == codes.end() ? 0 : found->second;
}
static std::string text(size_t number) { return " " + std::to_string(number); }
static std::string here() { return " in" + text(contexts.empty() ? 0 : contexts.back()); }

extern "C" {
void fake_reset() { record.clear(); codes.clear(); kernels.clear(); modules.clear(); names.clear(); loaded = 0; }
void fake_fail(const char* call, int code) { codes[call] = code; }
void fake_kernel(const char* name, size_t bytes, size_t module) { kernels[name] = bytes; modules[module].insert(name); }
const char* fake_record() { return record.c_str(); }
size_t fake_depth() { return contexts.size(); }
int fake_capture_mode() { return capture_mode; }

int cuInit(unsigned) { return done("cuInit"); }
int cuDriverGetVersion(int* version) { *version = 12020; return done("cuDriverGetVersion"); }
int cuDeviceGet(int* handle, int device) { *handle = device + 50; return done("cuDeviceGet"); }
int cuDeviceGetAttribute(int* value, int attribute, int handle) {
    *value = attribute == 97 ? 232448 : attribute == 16 ? 132 : -1;
    return done("cuDeviceGetAttribute", text(handle));
}
int cuDevicePrimaryCtxRetain(size_t* context, int handle) {
    *context = 1000 + handle;
    return done("cuDevicePrimaryCtxRetain", text(handle));
}
int cuCtxPushCurrent_v2(size_t context) {
    int code = done("cuCtxPushCurrent");
    if (!code) contexts.push_back(context);
    return code;
}
int cuCtxPopCurrent_v2(size_t* context) {
    *context = contexts.back();
    contexts.pop_back();
    return done("cuCtxPopCurrent");
}
int cuThreadExchangeStreamCaptureMode(int* mode) { std::swap(*mode, capture_mode); return 0; }
int cuModuleLoadDataEx(size_t* module, const char* image, unsigned count, const int* options, void** values) {
    std::string kind = std::memcmp(image, "\177ELF", 4) ? "load ptx" : "load cubin";
    for (unsigned i = 0; i < count; i++)
        if (options[i] == 5) std::snprintf((char*)values[i], 64, "log of %s", kind.c_str());
    int code = done(kind, here() + " mode" + text(capture_mode));
    if (!code) *module = 2000 + loaded++;
    return code;
}
int cuModuleGetFunction(size_t* function, size_t module, const char* name) {
    int code = done("cuModuleGetFunction", text(module) + " " + name);
    if (code) return code;
    if (!modules[module].count(name)) return 500;
    names.push_back(name);
    *function = 3000 + names.size() - 1;
    return 0;
}
#ifndef OLD
int cuFuncGetParamInfo(size_t function, size_t number, size_t* offset, size_t* size) {
    if (number) return 1;
    *offset = 0;
    *size = kernels[names[function - 3000]];
    return done("cuFuncGetParamInfo");
}
#endif
int cuFuncSetAttribute(size_t function, int attribute, int value) {
    return done("cuFuncSetAttribute", " " + names[function - 3000] + text(attribute) + text(value) + here());
}
#ifndef BROKEN
int cuLaunchKernel(size_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, size_t stream, void** parameters, void** extra) {
    std::string name = names[function - 3000], bytes;
    for (size_t i = 0; i < kernels[name]; i++) {
        char digits[3];
        std::snprintf(digits, 3, "%02x", ((unsigned char*)parameters[0])[i]);
        bytes += digits;
    }
    return done("cuLaunchKernel", " " + name + text(gx) + text(gy) + text(gz) + text(bx) + text(by) + text(bz) +
                text(shared) + text(stream) + here() + " " + bytes + (extra ? " extra" : ""));
}
#endif
int cuGetErrorName(int code, const char** name) {
    static std::map<int, std::string> made;
    if (code == 12345) return 1;
    *name = (made[code] = "CUDA_ERROR_" + std::to_string(code)).c_str();
    return 0;
}
int cuGetErrorString(int code, const char** words) {
    if (code == 12345) return 1;
    *words = "the driver's words";
    return 0;
}
}

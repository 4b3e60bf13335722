// Serves a step's requests for device memory from planned addresses in one arena.
//
// Without HEADRACE_TORCH: the record and the matching alone, with a C interface, for tests that have no GPU.
// With it, 100 x major + minor of torch: also an allocator around torch's own. What has no planned address is torch's allocator's work as before,
// with its statistics, its budget and its errors.
//
// Safe whatever the plan says: an address is given out only while no request that is alive overlaps it, and only to
// the compute stream, on which the work of the request before it is in order. A planned address is a decision about
// speed, never about results.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

constexpr int64_t kNone = -1;  // a request that the plan leaves to torch's allocator; a time that has not come
constexpr size_t kAhead = 64;  // requests of the plan that may be left out before the next one that matches
constexpr uint64_t kAlign = 512;

struct Record {
  int64_t bytes, begin, end, is_movable;  // is_movable: no other stream has used it
};

struct Planned {
  int64_t bytes, offset;
};

struct Steps {
  std::mutex mutex;
  std::atomic<bool> in_step = false;
  void* stream = nullptr;
  int64_t clock = 0, num_served = 0, num_strange = 0;
  std::vector<Record> records;
  std::unordered_map<uint64_t, size_t> alive;  // address to its record, of this step
  std::vector<Planned> plan;
  size_t next = 0;
  uint64_t base = 0, arena_bytes = 0;
  std::map<uint64_t, uint64_t> taken;  // of the arena: begin to end, also after the step that took them

  uint64_t aligned(uint64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

  bool is_free(uint64_t begin, uint64_t end) {
    auto after = taken.lower_bound(end);
    return after == taken.begin() || std::prev(after)->second <= begin;
  }

  void note(uint64_t address, size_t bytes) {
    alive[address] = records.size();
    records.push_back({static_cast<int64_t>(bytes), clock++, kNone, 1});
  }

  uint64_t ask(size_t bytes, void* on) {
    if (!in_step || on != stream || plan.empty()) return 0;
    size_t found = next, last = std::min(plan.size(), next + kAhead);
    while (found < last && plan[found].bytes != static_cast<int64_t>(bytes)) found++;
    if (found == last) {
      num_strange++;
      return 0;
    }
    num_strange += found - next;
    next = found + 1;
    if (plan[found].offset == kNone) return 0;
    uint64_t begin = base + plan[found].offset, end = begin + aligned(bytes);
    if (end > base + arena_bytes || !is_free(begin, end)) {
      num_strange++;
      return 0;
    }
    taken[begin] = end;
    num_served++;
    note(begin, bytes);
    return begin;
  }
};

Steps& steps = *new Steps;  // never destroyed: memory is freed until the process ends

}  // namespace

extern "C" {

// A step begins on this stream. The plan: n times (bytes, offset in the arena, or -1), in the order of the requests.
void headrace_begin(void* stream, const int64_t* plan, size_t n, uint64_t base, uint64_t arena_bytes) {
  std::lock_guard<std::mutex> lock(steps.mutex);
  steps.in_step = true;
  steps.stream = stream;
  steps.clock = steps.num_served = steps.num_strange = 0;
  steps.next = 0;
  steps.records.clear();
  steps.alive.clear();
  steps.base = base;
  steps.arena_bytes = arena_bytes;
  steps.plan.resize(n);
  if (n) std::memcpy(steps.plan.data(), plan, n * sizeof(Planned));
}

// The step is over; returns the number of its requests on the stream.
size_t headrace_end() {
  std::lock_guard<std::mutex> lock(steps.mutex);
  steps.in_step = false;
  steps.num_strange += steps.plan.size() - steps.next;
  return steps.records.size();
}

// Fills four numbers per request of the last step: bytes, begin, end or -1, whether it may have a planned address;
// and counts: requests served, requests off the plan, pieces of the arena that are still in use.
void headrace_read(int64_t* records, int64_t* counts) {
  std::lock_guard<std::mutex> lock(steps.mutex);
  if (!steps.records.empty()) std::memcpy(records, steps.records.data(), steps.records.size() * sizeof(Record));
  counts[0] = steps.num_served;
  counts[1] = steps.num_strange;
  counts[2] = static_cast<int64_t>(steps.taken.size());
}

// An address in the arena, or 0: the caller allocates, and says so with headrace_made.
uint64_t headrace_ask(size_t bytes, void* stream) {
  std::lock_guard<std::mutex> lock(steps.mutex);
  return steps.ask(bytes, stream);
}

void headrace_made(uint64_t address, size_t bytes, void* stream) {
  std::lock_guard<std::mutex> lock(steps.mutex);
  if (steps.in_step && stream == steps.stream) steps.note(address, bytes);
}

// A block's pass begins: a record of -1 bytes.
void headrace_mark() {
  std::lock_guard<std::mutex> lock(steps.mutex);
  if (steps.in_step) steps.records.push_back({kNone, steps.clock++, kNone, 0});
}

// Whether the address was the arena's.
int headrace_gone(uint64_t address) {
  std::lock_guard<std::mutex> lock(steps.mutex);
  auto record = steps.alive.find(address);
  if (record != steps.alive.end()) {
    if (steps.in_step) steps.records[record->second].end = steps.clock++;
    steps.alive.erase(record);
  }
  return static_cast<int>(steps.taken.erase(address));
}

// Another stream uses the memory; returns whether it is the arena's.
int headrace_shared(uint64_t address) {
  std::lock_guard<std::mutex> lock(steps.mutex);
  auto record = steps.alive.find(address);
  if (record != steps.alive.end()) steps.records[record->second].is_movable = 0;
  return static_cast<int>(steps.taken.count(address));
}
}

#ifdef HEADRACE_TORCH
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>

namespace {

using namespace c10;
using namespace c10::cuda::CUDACachingAllocator;

CUDAAllocator* torchs = nullptr;
DeviceIndex own_device = 0;
std::mutex& shared_mutex = *new std::mutex;
auto& shared_with = *new std::unordered_map<uint64_t, std::vector<cudaStream_t>>;  // memory of the arena, by address

uint64_t number(const void* address) { return reinterpret_cast<uint64_t>(address); }

// Memory of the arena that other streams use: the compute stream waits for them before the address is used again.
void wait_for_others(void* address) {
  std::vector<cudaStream_t> streams;
  {
    std::lock_guard<std::mutex> lock(shared_mutex);
    auto found = shared_with.find(number(address));
    if (found == shared_with.end()) return;
    streams = std::move(found->second);
    shared_with.erase(found);
  }
  for (cudaStream_t stream : streams) {
    cudaEvent_t event;
    C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    C10_CUDA_CHECK(cudaEventRecord(event, stream));
    C10_CUDA_CHECK(cudaStreamWaitEvent(static_cast<cudaStream_t>(steps.stream), event, 0));
    C10_CUDA_CHECK(cudaEventDestroy(event));
  }
}

void give_back(void* address) {
  if (address == nullptr) return;
  wait_for_others(address);
  if (!headrace_gone(number(address))) torchs->raw_delete(address);
}

class PlannedAllocator final : public CUDAAllocator {
 public:
  DataPtr allocate(size_t bytes) override {
    if (bytes == 0 || !steps.in_step) return torchs->allocate(bytes);
    DeviceIndex device = cuda::current_device();
    if (device != own_device) return torchs->allocate(bytes);  // its default stream has the same number
    cudaStream_t stream = cuda::getCurrentCUDAStream(device);
    void* address = reinterpret_cast<void*>(headrace_ask(bytes, stream));
    if (address == nullptr) {
      address = torchs->raw_alloc(bytes);
      headrace_made(number(address), bytes, stream);
    }
    return {address, address, &give_back, Device(DeviceType::CUDA, device)};
  }
  DeleterFnPtr raw_deleter() const override { return &give_back; }
  void raw_delete(void* address) override { give_back(address); }
  void recordStream(const DataPtr& memory, cuda::CUDAStream stream) override {
    if (memory.get_deleter() != &give_back) return torchs->recordStream(memory, stream);
    if (stream.stream() == static_cast<cudaStream_t>(steps.stream)) return;
    if (headrace_shared(number(memory.get()))) {
      std::lock_guard<std::mutex> lock(shared_mutex);
      shared_with[number(memory.get())].push_back(stream.stream());
      return;
    }
    DataPtr own(memory.get(), memory.get(), torchs->raw_deleter(), memory.device());
    torchs->recordStream(own, stream);
    own.release_context();
  }

  // All the rest is torch's allocator's.
  using Index = DeviceIndex;
  using Pool = MempoolId_t;
  using Words = std::vector<std::string>;
  void copy_data(void* to, const void* from, size_t bytes) const override { torchs->copy_data(to, from, bytes); }
  void* raw_alloc(size_t bytes) override { return torchs->raw_alloc(bytes); }
  void* raw_alloc_with_stream(size_t n, cudaStream_t s) override { return torchs->raw_alloc_with_stream(n, s); }
  void init(int num_devices) override { torchs->init(num_devices); }
  bool initialized() override { return torchs->initialized(); }
  double getMemoryFraction(Index d) override { return torchs->getMemoryFraction(d); }
  void setMemoryFraction(double share, Index d) override { torchs->setMemoryFraction(share, d); }
  std::vector<StreamSegmentSize> getExpandableSegmentSizes(Index d) override {
    return torchs->getExpandableSegmentSizes(d);
  }
  void enable(bool value) override { torchs->enable(value); }
  bool isEnabled() const override { return torchs->isEnabled(); }
  void emptyCache(Pool pool) override { torchs->emptyCache(pool); }
  void cacheInfo(Index d, size_t* largest) override { torchs->cacheInfo(d, largest); }
  void* getBaseAllocation(void* p, size_t* size) override { return torchs->getBaseAllocation(p, size); }
  CachingDeviceAllocator::DeviceStats getDeviceStats(Index d) override { return torchs->getDeviceStats(d); }
  void resetAccumulatedStats(Index d) override { torchs->resetAccumulatedStats(d); }
  void resetPeakStats(Index d) override { torchs->resetPeakStats(d); }
  SnapshotInfo snapshot(Pool pool, bool traces) override { return torchs->snapshot(pool, traces); }
  void beginAllocateToPool(Index d, Pool p, std::function<bool(cudaStream_t)> f) override {
    torchs->beginAllocateToPool(d, p, std::move(f));
  }
  void endAllocateToPool(Index d, Pool p) override { torchs->endAllocateToPool(d, p); }
  void releasePool(Index d, Pool p) override { torchs->releasePool(d, p); }
  int getPoolUseCount(Index d, Pool p) override { return torchs->getPoolUseCount(d, p); }
  void createOrIncrefPool(Index d, Pool p, std::shared_ptr<CUDAAllocator> by) override {
    torchs->createOrIncrefPool(d, p, std::move(by));
  }
  void setUseOnOOM(Index d, Pool p, bool use) override { torchs->setUseOnOOM(d, p, use); }
  void setNoSplit(Index d, Pool p) override { torchs->setNoSplit(d, p); }
  bool checkPoolLiveAllocations(Index d, Pool p, const std::unordered_set<void*>& expected) override {
    return torchs->checkPoolLiveAllocations(d, p, expected);
  }
  ShareableHandle shareIpcHandle(void* p) override { return torchs->shareIpcHandle(p); }
  std::shared_ptr<void> getIpcDevPtr(std::string handle) override { return torchs->getIpcDevPtr(std::move(handle)); }
  bool isHistoryEnabled() override { return torchs->isHistoryEnabled(); }
  void recordHistory(bool on, CreateContextFn f, size_t n, RecordContext w, bool clear, const Words& skip) override {
    torchs->recordHistory(on, f, n, w, clear, skip);
  }
  void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& words) override {
    torchs->recordAnnotation(words);
  }
  void pushCompileContext(std::string& words) override { torchs->pushCompileContext(words); }
  void popCompileContext() override { torchs->popCompileContext(); }
  void setUserMetadata(const std::string& words) override { torchs->setUserMetadata(words); }
  std::string getUserMetadata() override { return torchs->getUserMetadata(); }
  void attachOutOfMemoryObserver(OutOfMemoryObserver f) override { torchs->attachOutOfMemoryObserver(std::move(f)); }
  void attachAllocatorTraceTracker(AllocatorTraceTracker f) override {
    torchs->attachAllocatorTraceTracker(std::move(f));
  }
  void enablePeerAccess(Index d, Index other) override { torchs->enablePeerAccess(d, other); }
  cudaError_t memcpyAsync(void* to, int d, const void* from, int e, size_t n, cudaStream_t s, bool p2p) override {
    return torchs->memcpyAsync(to, d, from, e, n, s, p2p);
  }
  std::shared_ptr<AllocatorState> getCheckpointState(Index d, Pool p) override {
    return torchs->getCheckpointState(d, p);
  }
  CheckpointDelta setCheckpointPoolState(Index d, std::shared_ptr<AllocatorState> state) override {
    return torchs->setCheckpointPoolState(d, std::move(state));
  }
  std::string name() override { return torchs->name(); }
#if HEADRACE_TORCH >= 212
  std::shared_ptr<GatheredContext> getContextForPointer(const void* p) override {
    return torchs->getContextForPointer(p);
  }
  void attachOomRejectionObserver(OomRejectionObserver f) override {
    torchs->attachOomRejectionObserver(std::move(f));
  }
#endif
#if HEADRACE_TORCH >= 213
  void markCaptureBegin(Index d) override { torchs->markCaptureBegin(d); }
  void markCaptureEnd(Index d) override { torchs->markCaptureEnd(d); }
  DataPtr allocateWithAddress(size_t bytes, void* p) override { return torchs->allocateWithAddress(bytes, p); }
#endif
};

}  // namespace

// Put the planned allocator around torch's; once per process, after torch's has begun.
extern "C" void headrace_install(int device) {
  own_device = static_cast<DeviceIndex>(device);
  auto* planned = new PlannedAllocator;
  torchs = c10::cuda::CUDACachingAllocator::get();
  c10::cuda::CUDACachingAllocator::allocator.store(planned);
  c10::SetAllocator(DeviceType::CUDA, planned, 10);
}
#endif

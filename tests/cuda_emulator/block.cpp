// Runs a block: each of its threads is a fiber, all on one OS thread. A fiber runs until it has to
// wait for others, then the next one does.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "emulator.h"

thread_local constinit uint3 threadIdx{}, blockIdx{};
thread_local constinit dim3 blockDim{}, gridDim{};

namespace emulator {
namespace {

constexpr size_t kStackBytes = 512 << 10, kGuardBytes = 4 << 10;
// Where the stack of a thread begins below the end of its memory: were it the same place for all,
// the stacks of a block would compete for one set of the cache. 17 lines, as 17 and the number of
// sets have no common divisor.
size_t offset(unsigned thread) { return thread % 256 * 17 * 64; }

class Block;
// The block that this OS thread runs.
thread_local constinit Block* running = nullptr;

enum class State { kReady, kInWarp, kInBlock, kReturned };

// jmp_buf saves no signal mask, so that a switch makes no system call.
struct Fiber {
  ~Fiber() { munmap(stack, kStackBytes); }

  State state = State::kReady;
  unsigned thread = 0;
  uint64_t value = 0;  // what it brought to the primitive, then what it takes away
  Collective waits{};
  int source = 0;
  bool started = false;
  void* stack = nullptr;
  jmp_buf context;
  ucontext_t start;
};

// Mostly without a look at the strings.
bool same(const Collective& a, const Collective& b) {
  return (a.name == b.name && a.mask == b.mask && a.site.line() == b.site.line() &&
          a.site.column() == b.site.column() && a.site.file_name() == b.site.file_name()) ||
         a == b;
}

class Block {
 public:
  std::optional<std::string> run(const Launch& launch, unsigned index);
  uint64_t meet_in_warp(const Collective& what, uint64_t value, int source, bool ballot);
  int meet_in_block(const Collective& what, bool value, bool grid);
  [[noreturn]] void fail(const std::string& what);
  const Launch& launch() const { return *launch_; }
  int lane() const { return int(current_->thread % 32); }

 private:
  static void enter();
  void resume(Fiber& fiber);
  void pause() {
    if (_setjmp(current_->context) == 0) _longjmp(scheduler_, 1);
  }
  void grow(size_t threads);
  std::string where() const;
  std::string stuck() const;

  std::vector<std::unique_ptr<Fiber>> fibers_;
  const Launch* launch_ = nullptr;
  uint3 index_{};
  unsigned threads_ = 0, returned_ = 0, in_block_ = 0;
  int count_ = 0;  // of the threads at a barrier that brought true
  bool at_grid_ = false;
  Fiber* current_ = nullptr;
  std::string error_;
  jmp_buf scheduler_;
};

// A fiber's stack is used again by later blocks, perhaps on other OS threads: nothing in here may
// hold on to a thread-local variable's address from one round to the next.
void Block::enter() {
  Block* const block = running;
  Fiber* const self = block->current_;
  for (;;) {
    block->launch_->body();
    self->state = State::kReturned;
    ++block->returned_;
    block->pause();
  }
}

void Block::grow(size_t threads) {
  while (fibers_.size() < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->thread = unsigned(fibers_.size());
    fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber->stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(fiber->stack, kGuardBytes, PROT_NONE);
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack;
    fiber->start.uc_stack.ss_size = kStackBytes - offset(fiber->thread);
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, enter, 0);
    fibers_.push_back(std::move(fiber));
  }
}

void Block::resume(Fiber& fiber) {
  const dim3& shape = launch_->block;
  threadIdx = {fiber.thread % shape.x, fiber.thread / shape.x % shape.y,
               fiber.thread / shape.x / shape.y};
  current_ = &fiber;
  if (_setjmp(scheduler_) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

std::optional<std::string> Block::run(const Launch& launch, unsigned index) {
  const dim3 &shape = launch.block, &grid = launch.grid;
  launch_ = &launch;
  running = this;
  blockDim = shape;
  gridDim = grid;
  blockIdx = index_ = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
  threads_ = shape.x * shape.y * shape.z;
  returned_ = in_block_ = 0;
  grow(threads_);
  for (unsigned i = 0; i < threads_; ++i) fibers_[i]->state = State::kReady;
  // In any order, so that a barrier that is missing shows.
  std::vector<unsigned> order(threads_);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::minstd_rand(launch.seed + index));
  while (returned_ < threads_) {
    bool moved = false;
    for (unsigned i : order) {
      if (fibers_[i]->state != State::kReady) continue;
      resume(*fibers_[i]);
      moved = true;
      if (!error_.empty()) return error_;
      if (at_grid_) {
        at_grid_ = false;
        if (!launch.barrier->wait()) return "";
        for (unsigned j = 0; j < threads_; ++j) fibers_[j]->state = State::kReady;
      }
    }
    if (!moved) return where() + "deadlock: " + stuck();
  }
  return {};
}

uint64_t Block::meet_in_warp(const Collective& what, uint64_t value, int source, bool ballot) {
  Fiber* const self = current_;
  const unsigned first = self->thread / 32 * 32, lanes = std::min(32u, threads_ - first);
  // Lanes that the block does not have need not come.
  const uint32_t mask = what.mask & (0xffffffffu >> (32 - lanes));
  if (!(mask >> (self->thread - first) & 1)) fail("a lane outside of its own mask");
  self->waits = what;
  self->value = value;
  self->source = source;
  self->state = State::kInWarp;
  const auto taking_part = [&](unsigned lane) { return lane < lanes && (mask >> lane & 1); };
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (taking_part(lane) && fibers_[first + lane]->state != State::kInWarp) {
      pause();
      return self->value;
    }
  }
  uint32_t votes = 0;
  uint64_t values[32];
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Fiber& fiber = *fibers_[first + lane];
    if (!taking_part(lane)) continue;
    if (!same(fiber.waits, what)) fail("diverged: " + stuck());
    if (!taking_part(unsigned(fiber.source))) {
      fail("lane " + std::to_string(lane) + " reads lane " + std::to_string(fiber.source) +
           ", which takes no part in " + what.name);
    }
    values[lane] = fiber.value;
    votes |= uint32_t(fiber.value != 0) << lane;
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    Fiber& fiber = *fibers_[first + lane];
    if (!taking_part(lane)) continue;
    fiber.value = ballot ? votes : values[fiber.source];
    fiber.state = State::kReady;
  }
  return self->value;
}

int Block::meet_in_block(const Collective& what, bool value, bool grid) {
  Fiber* const self = current_;
  self->waits = what;
  self->state = State::kInBlock;
  if (in_block_++ == 0) count_ = 0;
  count_ += value;
  if (in_block_ < threads_) {
    pause();
    return int(self->value);
  }
  for (unsigned i = 0; i < threads_; ++i) {
    if (!same(fibers_[i]->waits, what)) fail("diverged: " + stuck());
  }
  in_block_ = 0;
  for (unsigned i = 0; i < threads_; ++i) {
    fibers_[i]->value = uint64_t(count_);
    if (!grid) fibers_[i]->state = State::kReady;
  }
  if (grid) {
    at_grid_ = true;
    pause();
  }
  return int(self->value);
}

// The fiber is left where it is, and none of the block's fibers is used again.
void Block::fail(const std::string& what) {
  error_ = where() + what;
  _longjmp(scheduler_, 1);
}

std::string Block::where() const {
  const auto number = [](unsigned n) { return std::to_string(n); };
  return "kernel " + kernel_name(launch_->kernel) + ", block (" + number(index_.x) + ", " +
         number(index_.y) + ", " + number(index_.z) + "): ";
}

// What the threads are at, those at the same thing together.
std::string Block::stuck() const {
  std::map<std::string, std::vector<unsigned>> at;
  for (unsigned i = 0; i < threads_; ++i) {
    const Fiber& fiber = *fibers_[i];
    const Site& site = fiber.waits.site;
    const std::string file = site.file_name() ? site.file_name() : "";
    const std::string place = std::string(fiber.waits.name ? fiber.waits.name : "") + " at " +
                              file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
    if (fiber.state == State::kReturned) at["returned"].push_back(i);
    if (fiber.state == State::kReady) at["not waiting"].push_back(i);
    if (fiber.state == State::kInBlock) at["waiting in " + place].push_back(i);
    if (fiber.state == State::kInWarp) {
      char mask[16];
      snprintf(mask, sizeof mask, "0x%08x", fiber.waits.mask);
      at["waiting in " + place + ", mask " + mask].push_back(i);
    }
  }
  std::string text;
  for (const auto& [what, threads] : at) {
    text += text.empty() ? "" : "; ";
    text += std::to_string(threads.size()) + " thread(s) " + what + " (";
    for (size_t i = 0; i < std::min<size_t>(threads.size(), 4); ++i) {
      text += (i ? ", " : "") + std::to_string(threads[i]);
    }
    text += threads.size() > 4 ? ", …)" : ")";
  }
  return text;
}

// Blocks, with their fibers' stacks, that no launch uses now.
std::mutex idle_mutex;
std::vector<std::unique_ptr<Block>> idle;

std::unique_ptr<Block> take_block() {
  const std::lock_guard<std::mutex> lock(idle_mutex);
  if (idle.empty()) return std::make_unique<Block>();
  auto block = std::move(idle.back());
  idle.pop_back();
  return block;
}

}  // namespace

std::optional<std::string> run_block(const Launch& launch, unsigned index) {
  auto block = take_block();
  auto error = block->run(launch, index);
  running = nullptr;
  if (error) return error;
  const std::lock_guard<std::mutex> lock(idle_mutex);
  idle.push_back(std::move(block));
  return {};
}

uint64_t shuffle(const Collective& what, uint64_t value, int source) {
  return running->meet_in_warp(what, value, source, false);
}
uint32_t ballot(const Collective& what, bool value) {
  return uint32_t(running->meet_in_warp(what, value, lane(), true));
}
int block_count(const Collective& what, bool value) {
  return running->meet_in_block(what, value, false);
}
void grid_sync(const Collective& what) {
  if (!cooperative()) fail("this_grid().sync() in a launch that is not cooperative");
  running->meet_in_block(what, true, true);
}
bool cooperative() { return running->launch().barrier != nullptr; }
int lane() { return running->lane(); }

void fail(const std::string& what) {
  if (running) running->fail(what);
  throw std::runtime_error("CUDA emulator: " + what);
}

}  // namespace emulator

// Called by code that is compiled with -fsanitize=alignment, in place of that sanitizer's library.
struct Misaligned {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
extern "C" void __ubsan_handle_type_mismatch_v1(const Misaligned* access, uintptr_t address) {
  const std::string file = access->file;
  emulator::fail("an access on " + std::to_string(1 << access->log_alignment) +
                 " bytes to an address that ends in " + std::to_string(address % 256) + " at " +
                 file.substr(file.rfind('/') + 1) + ":" + std::to_string(access->line));
}

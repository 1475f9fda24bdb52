// A function with a stack of its own that can stop in the middle and go on later: one for each
// CUDA thread. Boost.Context where it is installed. Otherwise ucontext makes the stack, and
// _setjmp / _longjmp switch, because swapcontext would make a system call each time.
#pragma once

#include <cstddef>
#include <cstdint>

#if HOSTCUDA_BOOST
#include <boost/context/fiber.hpp>
#include <boost/context/preallocated.hpp>
#include <boost/context/stack_context.hpp>
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

namespace hostcuda {

class Fiber {
 public:
  using Entry = void (*)(void*);

  // Runs entry(argument), which never returns, on the given stack at the first resume().
  void start(Entry entry, void* argument, char* stack, size_t bytes) {
    entry_ = entry;
    argument_ = argument;
#if HOSTCUDA_BOOST
    boost::context::stack_context context;
    context.size = bytes;
    context.sp = stack + bytes;
    inside_ = boost::context::fiber(std::allocator_arg,
                                    boost::context::preallocated(context.sp, context.size, context),
                                    NoStack{}, [this](boost::context::fiber&& outside) {
                                      outside_ = std::move(outside);
                                      entry_(argument_);
                                      return std::move(outside_);
                                    });
#else
    getcontext(&first_);
    first_.uc_stack.ss_sp = stack;
    first_.uc_stack.ss_size = bytes;
    first_.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&first_, reinterpret_cast<void (*)()>(&Fiber::begin), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
    started_ = false;
#endif
  }

  // From outside: lets the fiber run until it yields.
  void resume() {
#if HOSTCUDA_BOOST
    inside_ = std::move(inside_).resume();
#else
    if (_setjmp(outside_) != 0) return;
    if (started_) _longjmp(inside_, 1);
    started_ = true;
    setcontext(&first_);
#endif
  }

  // From inside: goes back to whoever resumed it.
  void yield() {
#if HOSTCUDA_BOOST
    outside_ = std::move(outside_).resume();
#else
    if (_setjmp(inside_) == 0) _longjmp(outside_, 1);
#endif
  }

 private:
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
#if HOSTCUDA_BOOST
  struct NoStack {  // the stack belongs to whoever started the fiber
    boost::context::stack_context allocate() { return {}; }
    void deallocate(boost::context::stack_context&) {}
  };
  boost::context::fiber inside_, outside_;
#else
  static void begin(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
    self->entry_(self->argument_);
  }
  ucontext_t first_;
  jmp_buf inside_, outside_;
  bool started_ = false;
#endif
};

}  // namespace hostcuda

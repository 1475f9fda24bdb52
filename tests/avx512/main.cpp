// kernel_check [--list] [--copies NAME,...]: every kernel's copies against `base`.
//
// Static and without torch, so that it runs as the only program of an emulated machine too. There
// it is process 1, and the last line is all that the world outside can see of its exit code.
#include <sys/reboot.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <sstream>

#include "report.h"

namespace {

int check(int argc, char** argv) {
  std::vector<std::string> copies = kernel_check::runnable_copies();
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--list") == 0) {
      for (const std::string& name : copies) std::printf("%s\n", name.c_str());
      return 0;
    }
    if (std::strcmp(argv[i], "--copies") == 0 && i + 1 < argc) {
      copies.clear();
      std::stringstream names(argv[++i]);
      for (std::string name; std::getline(names, name, ',');) copies.push_back(name);
    } else {
      std::printf("kernel_check: got %s; need --list or --copies NAME,NAME\n", argv[i]);
      return 2;
    }
  }
  const int wrong = kernel_check::run_all(copies);
  if (copies.empty()) std::printf("kernel_check: no copy but base runs here\n");
  return wrong > 0 || copies.empty() ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int code = check(argc, argv);
  std::printf("kernel_check: exit %d\n", code);
  std::fflush(stdout);
  if (getpid() == 1) {
    sleep(1);  // until the console has said it
    reboot(RB_POWER_OFF);
    for (;;) pause();
  }
  return code;
}

// A plugin for qemu-user that counts the instructions a program executes and writes their number on the standard error:
//
//   gcc -shared -fPIC -O2 instructions.c -o instructions.so && qemu-aarch64 -plugin ./instructions.so program
//
// What it needs of qemu's plugin interface, version 1, is declared here, since systems that have qemu may lack its header.
#include <inttypes.h>
#include <stdio.h>

typedef uint64_t PluginId;
struct Block;
extern void qemu_plugin_register_vcpu_tb_trans_cb(PluginId id, void (*call)(PluginId id, struct Block* block));
extern size_t qemu_plugin_tb_n_insns(const struct Block* block);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct Block* block, int operation, void* at, uint64_t by);
extern void qemu_plugin_register_atexit_cb(PluginId id, void (*call)(PluginId id, void* given), void* given);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t executed;

static void translated(PluginId id, struct Block* block) {
  (void)id;
  const int add = 0;  // the operation
  qemu_plugin_register_vcpu_tb_exec_inline(block, add, &executed, qemu_plugin_tb_n_insns(block));
}

static void ended(PluginId id, void* given) {
  (void)id, (void)given;
  fprintf(stderr, "%" PRIu64 "\n", executed);
}

__attribute__((visibility("default"))) int qemu_plugin_install(PluginId id, const void* info, int count, char** given) {
  (void)info, (void)count, (void)given;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}

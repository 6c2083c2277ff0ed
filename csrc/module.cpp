// Registration: the operators' schemas are defined in fastres/ops.py, implemented here.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/capability.h"
#include "cpu/conv_fold_cache.h"
#include "cpu/conv_plan.h"
#include "cpu/operators.h"
#include "cpu/pooled.h"
#include "cuda/info.h"
#include "cuda/operators.h"
#include "functional.h"
#include "program.h"
#include "sites.h"

TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("add_relu", &fastres::cpu::add_relu);
  m.impl("add_relu_backward", &fastres::cpu::add_relu_backward);
  m.impl("bn_relu", &fastres::cpu::bn_relu);
  m.impl("bn_relu_apply", &fastres::cpu::bn_relu_apply);
  m.impl("bn_relu_backward", &fastres::cpu::bn_relu_backward);
  m.impl("conv", &fastres::cpu::conv);
  m.impl("conv_dgrad", &fastres::cpu::conv_dgrad);
  m.impl("conv_wgrad", &fastres::cpu::conv_wgrad);
  m.impl("conv_bn_relu", &fastres::cpu::conv_bn_relu);
  m.impl("conv_bn_relu_", &fastres::cpu::conv_bn_relu_);
  m.impl("conv_bn_relu_pool", &fastres::cpu::conv_bn_relu_pool);
  m.impl("mean_linear", &fastres::cpu::mean_linear);
}

#if defined(FASTRES_CUDA)
TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
  m.impl("add_relu", &fastres::cuda::add_relu);
  m.impl("add_relu_backward", &fastres::cuda::add_relu_backward);
  m.impl("bn_relu", &fastres::cuda::bn_relu);
  m.impl("bn_relu_backward", &fastres::cuda::bn_relu_backward);
  m.impl("bn_relu_moments", &fastres::cuda::bn_relu_moments);
  m.impl("bn_relu_apply", &fastres::cuda::bn_relu_apply);
  m.impl("bn_relu_conv", &fastres::cuda::bn_relu_conv);
  m.impl("bn_relu_conv_backward", &fastres::cuda::bn_relu_conv_backward);
  m.impl("conv", &fastres::cuda::conv);
  m.impl("conv_dgrad", &fastres::cuda::conv_dgrad);
  m.impl("conv_wgrad", &fastres::cuda::conv_wgrad);
  m.impl("conv_bn_relu", &fastres::cuda::conv_bn_relu);
  m.impl("conv_bn_relu_training", &fastres::cuda::conv_bn_relu_training);
}
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = FASTRES_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = "g++ " __VERSION__;
  info["cpu_capabilities"] = fastres::cpu::compiled_capabilities();
  info["cpu_capability"] = fastres::cpu::capability_name();
  info["cuda"] = kCuda;
  info["cuda_archs"] = pybind11::str(FASTRES_CUDA_ARCHS).attr("split")();
#if defined(FASTRES_CUDA)
  info["cuda_kernels"] = fastres::cuda::kernel_names();
#endif
  return info;
}

pybind11::dict cache_info() {
  const auto cache = fastres::cpu::fold_cache_info();
  pybind11::dict info;
  info["entries"] = cache.entries;
  info["bytes"] = cache.bytes;
  return info;
}

#if defined(FASTRES_CUDA)
pybind11::dict cuda_info() {
  const auto found = fastres::cuda::info();
  pybind11::list devices;
  for (const auto& device : found.devices) {
    pybind11::dict d;
    d["name"] = device.name;
    d["capability"] = pybind11::make_tuple(device.major, device.minor);
    d["multiprocessors"] = device.multiprocessors;
    devices.append(d);
  }
  pybind11::dict info;
  info["driver"] = found.driver;
  info["runtime"] = found.runtime;
  info["error"] = found.error;
  info["devices"] = devices;
  return info;
}

pybind11::list cuda_kernels() {
  pybind11::list kernels;
  for (const auto& kernel : fastres::cuda::kernels()) {
    pybind11::dict k;
    k["name"] = kernel.name;
    k["form"] = kernel.form;
    k["registers"] = kernel.registers;
    k["local_bytes"] = kernel.local_bytes;
    k["shared_bytes"] = kernel.shared_bytes;
    k["blocks_per_multiprocessor"] = kernel.blocks_per_multiprocessor;
    k["architecture"] = kernel.architecture;
    kernels.append(k);
  }
  return kernels;
}
#endif

pybind11::dict pool_info() {
  const auto info = fastres::cpu::pool_info();
  const auto usage = [](const fastres::cpu::Pool::Usage& u) {
    pybind11::dict bytes;
    bytes["in_use"] = u.in_use;
    bytes["held"] = u.held;
    bytes["peak"] = u.peak;
    return bytes;
  };
  pybind11::dict pools;
  pools["outputs"] = usage(info.outputs);
  pools["filters"] = usage(info.filters);
  return pools;
}

void clear_cache() {
  fastres::cpu::clear_fold_cache();
  fastres::cpu::release_pools();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of fastres; see fastres.ops for their schemas.";
  m.def("build_info", &build_info, "What this extension was built with and runs on.");
  fastres::register_program(m);
  m.def("conv_bn_act", &fastres::conv_bn_act, "act(bn(conv(input)) + residual); see csrc/sites.h.");
  m.def("bn_act", &fastres::bn_act, "act(bn(input) + residual); see csrc/sites.h.");
  m.def("convolve", &fastres::convolve, "conv(input); see csrc/sites.h.");
  m.def("conv_bn_act_pool", &fastres::conv_bn_act_pool, "pool(act(bn(conv(input))))");
  m.def("mean_linear", &fastres::mean_linear, "linear(pooling(input)); see csrc/sites.h.");
  m.def("add_relu", &fastres::functional::add_relu, "See csrc/functional.h.");
  m.def("bn_relu", &fastres::functional::bn_relu, "See csrc/functional.h.");
  m.def("conv_bn_relu", &fastres::functional::conv_bn_relu, "See csrc/functional.h.");
  m.def("conv_by", &fastres::cpu::conv_by, "One convolution by a named algorithm.");
  m.def("conv_wgrad_by", &fastres::cpu::conv_wgrad_by, "A weight's gradient, likewise.");
  m.def("conv_algorithm", &fastres::cpu::conv_algorithm, "What computes a convolution.");
  m.def("conv_wgrad_algorithm", &fastres::cpu::conv_wgrad_algorithm,
        "What computes a weight's gradient.");
  m.def("limit_winograd_tile", &fastres::cpu::limit_winograd_tile,
        "The largest tile of Winograd's convolutions; 0 for none of them.");
  m.def("cache_info", &cache_info, "Folded convolution weights kept for inference.");
#if defined(FASTRES_CUDA)
  m.def("cuda_info", &cuda_info, "Versions and devices, as the CUDA part finds them.");
  m.def("cuda_kernels", &cuda_kernels, "Registers, memory, occupancy; see csrc/cuda/info.h.");
#endif
  m.def("pool_info", &pool_info, "Bytes of outputs and packed filters; see csrc/cpu/pool.h.");
  m.def("clear_cache", &clear_cache, "Drops folded weights and the memory kept for next calls.");
}

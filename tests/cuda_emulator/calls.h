// Entry points take a dtype by its name and return null, or what went wrong.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <exception>
#include <string>

template <typename F>
const char* with_dtype(const std::string& dtype, F f) {
  static std::string message;
  try {
    if (dtype == "float64")
      f(double());
    else if (dtype == "float32")
      f(float());
    else if (dtype == "float16")
      f(__half());
    else if (dtype == "bfloat16")
      f(__nv_bfloat16());
    else
      throw std::runtime_error("no kernel for " + dtype);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// The same for kernels of 16-bit values.
template <typename F>
const char* with_16_bits(const std::string& dtype, F f) {
  return with_dtype(dtype, [&](auto type) {
    if constexpr (sizeof(type) == 2)
      f(type);
    else
      throw std::runtime_error("16-bit values only");
  });
}

// SPDX-License-Identifier: Apache-2.0
// Vectorised e^x, 2^x and log x on one register.
#pragma once

#include "vec.h"

namespace mvit {
namespace MVIT_ISA {

// e^x = 2^n · 2^f with n = round(x · log2(e)) and f in [-1/2, 1/2]. The polynomials minimise the relative error of 2^f
// on that interval with the constant term fixed at 1, so that e^0 is exactly 1: 2.6e-9 for float, 1.8e-17 for double.
template <typename T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr int degree = 6;
  static constexpr float coefficient[degree + 1] = {1.0f,           0.6931472149680279f, 0.24022652782887738f,
                                                    0.05550310551013797f, 0.009617692992973063f, 0.001340664390235176f,
                                                    0.00015594678161326619f};
  static constexpr float lowest = -88.029691f, highest = 88.722839f;  // ln(2^-127), ln(2^128): results 0 and infinity
  static constexpr float round_and_bias = 12582912.0f + 127;   // 1.5 · 2^23: adding it leaves n + 127 in the low bits
  static constexpr float log2e = 1.44269504088896340736f, log2e_rest = 1.92596303e-8f;
  static constexpr float ln2 = 0.693359375f, ln2_rest = -2.12194440e-4f;  // n · ln2 is exact
  static constexpr int mantissa_bits = 23;
};
template <>
struct Exp<double> {
  static constexpr int degree = 11;
  static constexpr double coefficient[degree + 1] = {
      1.0,
      0.69314718055994569675,
      0.24022650695910098007,
      0.055504108664790394552,
      0.0096181291076070023796,
      0.0013333558153439964747,
      0.0001540353044157213033,
      1.5252727385193868197e-5,
      1.3215442675329822143e-6,
      1.0180647659234138888e-7,
      7.0725704128144235096e-9,
      4.078071929588336665e-10,
  };
  static constexpr double lowest = -709.08956571282405, highest = 709.78271289338400;
  static constexpr double round_and_bias = 6755399441055744.0 + 1023;  // 1.5 · 2^52, as above
  static constexpr double log2e = 1.44269504088896340736, log2e_rest = 2.03552737409310331e-17;
  static constexpr double ln2 = 6.93147180369123816490e-01, ln2_rest = 1.90821492927058770002e-10;
  static constexpr int mantissa_bits = 52;
};

// x = n + f, n an integer and |f| <= 1/2. Except on AVX-512, `biased` holds n + bias in its low bits: the exponent
// field of 2^n.
template <typename T>
struct WholeAndRest {
  Vec<T> whole, rest, biased;
};

// Splits factor · x. The remainder is computed with an FMA, so the product is not rounded before its integer part is
// subtracted.
template <typename T>
MVIT_INLINE WholeAndRest<T> whole_and_rest(Vec<T> x, Vec<T> factor) {
  WholeAndRest<T> parts;
#if MVIT_VECTOR_BYTES == 64
  using Native = typename Vec<T>::Native;
  const Vec<T> product = x * factor;
  if constexpr (sizeof(T) == 4)
    parts.whole = Native(_mm512_maskz_roundscale_ps(-1, product.native, _MM_FROUND_TO_NEAREST_INT));
  else
    parts.whole = Native(_mm512_maskz_roundscale_pd(-1, product.native, _MM_FROUND_TO_NEAREST_INT));
#else
  parts.biased = fma(x, factor, Vec<T>(Exp<T>::round_and_bias));
  parts.whole = parts.biased - Vec<T>(Exp<T>::round_and_bias);
#endif
  parts.rest = fma(x, factor, -parts.whole);
  return parts;
}

template <typename T>
MVIT_INLINE Vec<T> exp2(const WholeAndRest<T>& parts) {
  using E = Exp<T>;
  using Native = typename Vec<T>::Native;
  Vec<T> p(E::coefficient[E::degree]);
#pragma GCC unroll 16
  for (int i = E::degree - 1; i >= 0; --i) p = fma(p, parts.rest, Vec<T>(E::coefficient[i]));
#if MVIT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return Native(_mm512_maskz_scalef_ps(-1, p.native, parts.whole.native));
  else
    return Native(_mm512_maskz_scalef_pd(-1, p.native, parts.whole.native));
#else
  using NativeInteger = typename Vec<T>::NativeInteger;
  return p * Vec<T>(Native(NativeInteger(parts.biased.native) << E::mantissa_bits));
#endif
}

// e^x to within 2 ulp; 0 where the result would be subnormal, infinity on overflow, NaN for NaN. For x = infinity the
// result is infinity, except on AVX-512, where it is NaN: scalef needs no upper clamp for finite x, so there is none.
template <typename T>
MVIT_INLINE Vec<T> exp(Vec<T> x) {
  x = maximum(Vec<T>(Exp<T>::lowest), x);
#if MVIT_VECTOR_BYTES != 64
  x = minimum(Vec<T>(Exp<T>::highest), x);
#endif
  WholeAndRest<T> parts = whole_and_rest(x, Vec<T>(Exp<T>::log2e));
#if MVIT_VECTOR_BYTES >= 32 || defined(MVIT_NEON)
  parts.rest = fma(x, Vec<T>(Exp<T>::log2e_rest), parts.rest);  // without this term e^-80 is off by 17 ulp
#else  // no guaranteed FMA: x · log2(e) may have been rounded, which costs 60 ulp
  parts.rest = fma(parts.whole, Vec<T>(-Exp<T>::ln2_rest), fma(parts.whole, Vec<T>(-Exp<T>::ln2), x));
  parts.rest = parts.rest * Vec<T>(Exp<T>::log2e);
#endif
  return exp2(parts);
}

#if MVIT_VECTOR_BYTES == 64
// e^-x for SiLU. It is on the critical path of products with few channels: each operation here costs up to 2 % of such
// an inverted residual. e^-x = 2^w · e^-r, where w = n + j / 16 is in the low bits of `shifted`, 2^(j/16) comes from a
// table in one register and |r| <= ln(2) / 32, so three terms suffice; the last two coefficients minimise the relative
// error, 1.6e-9. Using a single constant for ln 2 costs 0.1 ulp at x = -5 and 2 ulp at x = -80. For |x| >= 1024 the
// result is 0 or infinity. NaN gives a finite number; SiLU is NaN regardless because its numerator is.
alignas(64) constexpr float kPowersOfTwo[16] = {  // 2^(j/16)
    1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
    1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
    1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f};
MVIT_INLINE Vec<float> exp_of_minus(Vec<float> x) {
  constexpr int least_magnitude = 2;  // the operand of smaller magnitude, with the sign of the first
  const Vec<float> bounded(_mm512_maskz_range_ps(-1, x.native, Vec<float>(1024.0f).native, least_magnitude));
  const Vec<float> round(1.5f * (1 << 19));  // adding it rounds to a multiple of 1/16
  const Vec<float> shifted = fma(bounded, Vec<float>(-Exp<float>::log2e), round), whole = shifted - round;
  const Vec<float> power(
      _mm512_maskz_permutexvar_ps(-1, _mm512_castps_si512(shifted.native), _mm512_load_ps(kPowersOfTwo)));
  const Vec<float> rest = fma(whole, Vec<float>(0.69314718055994531f), bounded);
  Vec<float> p = fma(rest, Vec<float>(-0.16666719f), Vec<float>(0.50001619f));
  p = fma(p, rest, Vec<float>(-1.0f)) * rest;
  return Vec<float>(_mm512_maskz_scalef_ps(-1, fma(power, p, power).native, whole.native));  // 2^floor(whole)
}
#endif

// 1 / (1 + e^-x). On AVX-512 floats take an estimate of 6e-5 and one Newton step (4e-9) in place of a division of 10 to 16
// cycles a vector. If the divisor is infinite the step is NaN, and is left out.
template <typename T>
MVIT_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> one(T(1));
#if MVIT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const Vec<T> divisor = one + exp_of_minus(x), estimate(_mm512_maskz_rcp14_ps(-1, divisor.native));
    return fma(estimate, minimum(fma(-divisor, estimate, one), one), estimate);
  }
#endif
  return one / (one + exp(-x));
}

// 2^x, with the accuracy of exp. On AVX-512 scalef takes the exponent from x itself and reduce gives the fraction in
// [0, 1), so x needs no clamping.
template <typename T>
MVIT_INLINE Vec<T> exp2(Vec<T> x) {
#if MVIT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const Vec<T> rest(_mm512_maskz_reduce_ps(-1, x.native, _MM_FROUND_TO_NEG_INF));  // 0 for infinity
    // Minimax in relative error of 2^rest on [0, 1) with the constant term fixed at 1: 8.2e-8, 1.4e-7 with rounding.
    Vec<T> p(0.001867131f);
    p = fma(p, rest, Vec<T>(0.009017027f));
    p = fma(p, rest, Vec<T>(0.055799916f));
    p = fma(p, rest, Vec<T>(0.24016444f));
    p = fma(p, rest, Vec<T>(0.6931513f));
    p = fma(p, rest, Vec<T>(1.0f));
    return Vec<T>(_mm512_maskz_scalef_ps(-1, p.native, x.native));
  }
#endif
  constexpr T highest = sizeof(T) == 4 ? 128 : 1024;
  x = minimum(Vec<T>(highest), maximum(Vec<T>(1 - highest), x));
  return exp2(whole_and_rest(x, Vec<T>(T(1))));
}

// Natural logarithm of positive normal numbers: x = 2^e · m with m in [sqrt(1/2), sqrt(2)), and
// log m = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + …) with s = (m - 1) / (m + 1), |s| <= 0.1716.
template <typename T>
MVIT_INLINE Vec<T> log(Vec<T> x) {
  using Native = typename Vec<T>::Native;
  using Integer = typename Vec<T>::Integer;
  using NativeInteger = typename Vec<T>::NativeInteger;
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;
  constexpr Integer root_half = static_cast<Integer>(sizeof(T) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd);
  const NativeInteger bits = NativeInteger(x.native);
  const NativeInteger exponent = (bits - root_half) >> Exp<T>::mantissa_bits;
  const Vec<T> m = Native(bits - (exponent << Exp<T>::mantissa_bits));
  const Vec<T> s = (m - Vec<T>(T(1))) / (m + Vec<T>(T(1)));
  const Vec<T> s2 = s * s;
  Vec<T> series(T(2) / (2 * terms - 1));
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) series = fma(series, s2, Vec<T>(T(2) / (2 * i + 1)));
  const Vec<T> e = __builtin_convertvector(exponent, Native);
  const Vec<T> result = fma(e, Vec<T>(T(0.693147180559945309417)), s * series);
  return result + (x - x);  // makes NaN of NaN and infinity, whose bit patterns would otherwise give a number
}

}  // namespace MVIT_ISA
}  // namespace mvit

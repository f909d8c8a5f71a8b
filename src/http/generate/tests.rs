//! Pictures beside what Pillow makes of them (`models/tests/golden/make_edits.py`).

#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::Device;

use super::*;

#[test]
fn pictures_are_scaled_as_pillow_scales_them() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden/pipeline");
    let tensors = golden.join("edits.safetensors");
    let tensors = candle_core::safetensors::load(tensors, &Device::Cpu).unwrap();
    let bytes = |name: &str| tensors[name].flatten_all().unwrap().to_vec1::<u8>().unwrap();
    let large = RgbImage::from_raw(56, 40, bytes("large")).unwrap();
    let ours = picture(&large, 3, [16, 24]);
    assert_eq!((ours.width, ours.height, ours.channels), (24, 16, 3));
    let far = ours.pixels.iter().zip(bytes("scaled")).map(|(a, b)| a.abs_diff(b)).max();
    assert!(far.unwrap() <= 2, "{far:?} of 255");
}

#[test]
fn a_mask_is_looked_at_where_latents_begin() {
    let mask = GrayImage::from_fn(8, 4, |x, _| image::Luma([if x < 4 { 0 } else { 255 }]));
    assert_eq!(drawn(&mask, [4, 8], 2), [false, false, true, true].repeat(2));
    assert_eq!(drawn(&mask, [2, 4], 1), [false, false, true, true].repeat(2));
}

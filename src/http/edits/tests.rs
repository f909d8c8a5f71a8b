//! Pictures beside what Pillow makes of them (`models/tests/golden/make_edits.py`).

#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::Device;

use super::*;

/// One that lies on its side and is partly transparent.
#[test]
fn pictures_are_turned_and_opaque_as_pillow_has_them() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden/pipeline");
    let tensors = golden.join("edits.safetensors");
    let tensors = candle_core::safetensors::load(tensors, &Device::Cpu).unwrap();
    let bytes = |name: &str| tensors[name].flatten_all().unwrap().to_vec1::<u8>().unwrap();
    let picture = decoded(&bytes("turned")).unwrap();
    assert_eq!(picture.dimensions(), (10, 14));
    assert_eq!(picture.into_raw(), bytes("upright"));
}

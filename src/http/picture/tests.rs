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
    let picture = decoded("image", &bytes("turned"), &Budget::new(1 << 20)).unwrap();
    assert_eq!(picture.pixels.dimensions(), (10, 14));
    assert_eq!(picture.pixels.into_raw(), bytes("upright"));
}

#[test]
fn pictures_take_of_what_there_is_for_bodies_as_long_as_they_are_there() {
    let mut file = Cursor::new(Vec::new());
    let pixels = RgbImage::new(100, 10);
    pixels.write_to(&mut file, ImageFormat::Png).unwrap();
    // Seven bytes a pixel while it is decoded, and three from then on; one takes at most half of what is left.
    let budget = Budget::new(17_000);
    let first = decoded("image", file.get_ref(), &budget).unwrap();
    let second = decoded("image", file.get_ref(), &budget);
    let third = decoded("image", file.get_ref(), &budget);
    assert!(second.is_ok());
    assert_eq!(third.unwrap_err().status, StatusCode::TOO_MANY_REQUESTS);
    drop((first, second));
    assert!(decoded("image", file.get_ref(), &budget).is_ok());
}

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use candle_core::Device;
use flate2::{Compression, write::GzEncoder};
use image::{GrayImage, ImageFormat, RgbImage};
use tempfile::{TempDir, tempdir};

use super::Images;
use crate::npz::{self, Array, Values};

fn idx(magic: u8, sizes: &[u32], body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, magic];
    bytes.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
    bytes.extend(body);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("in memory");
    encoder.finish().expect("in memory")
}

fn png(gray: u8) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let image = GrayImage::from_fn(3, 2, |x, y| [gray + (x + 3 * y) as u8].into());
    image.write_to(&mut bytes, ImageFormat::Png).expect("in memory");
    bytes.into_inner()
}

fn file(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
    fs::write(&path, bytes).expect("a file");
    path
}

fn refusal(path: &Path) -> String {
    Images::open(path).expect_err("refused").to_string()
}

#[test]
fn idx_files_bring_the_labels_beside_them() {
    let folder = tempdir().expect("a folder");
    let pixels: Vec<u8> = (0..12).collect();
    let path = file(&folder, "t-images-idx3-ubyte.gz", &gzip(&idx(3, &[2, 2, 3], &pixels)));
    file(&folder, "t-labels-idx1-ubyte", &idx(1, &[2], &[7, 4]));
    let images = Images::open(&path).expect("images");
    assert_eq!((images.len(), images.channels, images.height, images.width), (2, 1, 2, 3));
    assert_eq!(images.image(1), &pixels[6..]);
    assert_eq!(images.labels, Some(vec![7, 4]));
    assert_eq!(images.classes(), 8);
}

#[test]
fn broken_idx_files_are_refused_by_name() {
    let folder = tempdir().expect("a folder");
    let short = file(&folder, "short", &idx(3, &[2, 2, 3], &[0; 11]));
    assert!(refusal(&short).contains("announces 12 bytes and holds 11"), "{}", refusal(&short));
    let cut = file(&folder, "cut.gz", &gzip(&idx(3, &[2, 2, 3], &[0; 12]))[..20]);
    assert!(refusal(&cut).contains("cut.gz: cannot be unpacked"), "{}", refusal(&cut));
    let text = file(&folder, "notes.txt", b"hello");
    assert!(refusal(&text).contains("notes.txt: is no set of images"), "{}", refusal(&text));
    let huge = file(&folder, "huge", &idx(3, &[u32::MAX; 3], &[0; 12]));
    assert!(refusal(&huge).contains("announces"), "{}", refusal(&huge));
    let path = file(&folder, "u-images-idx3-ubyte", &idx(3, &[1, 2, 3], &[0; 6]));
    file(&folder, "u-labels-idx1-ubyte", &idx(1, &[2], &[7, 4]));
    assert!(refusal(&path).contains("has 2 labels"), "{}", refusal(&path));
}

#[test]
fn folders_and_archives_of_classes_hold_the_same() {
    let folder = tempdir().expect("a folder");
    let (boots, coats) = (png(10), png(20));
    file(&folder, "set/coat/0.png", &coats);
    file(&folder, "set/boot/1.png", &boots);
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_dir_all("set", folder.path().join("set")).expect("an archive");
    let tar = tar.into_inner().expect("an archive");
    let plain = file(&folder, "set.tar", &tar);
    let zipped = file(&folder, "set.tar.gz", &gzip(&tar));
    let zstd = ruzstd::encoding::compress_to_vec(
        &tar[..],
        ruzstd::encoding::CompressionLevel::Uncompressed,
    );
    let zstd = file(&folder, "set.tar.zst", &zstd);

    let images = Images::open(&folder.path().join("set")).expect("images");
    assert_eq!(images.class_names, ["boot", "coat"]);
    assert_eq!(images.labels, Some(vec![0, 1]));
    assert_eq!(images.image(0), [10, 11, 12, 13, 14, 15]);
    for path in [plain, zipped, zstd] {
        let mut archived = Images::open(&path).expect("images");
        // The archive's order is its own.
        if archived.labels == Some(vec![1, 0]) {
            let (first, second) = archived.pixels.split_at_mut(6);
            first.swap_with_slice(second);
            archived.labels = Some(vec![0, 1]);
        }
        assert_eq!(archived, images, "{}", path.display());
    }
}

#[test]
fn files_that_are_no_images_are_refused_by_name() {
    let folder = tempdir().expect("a folder");
    file(&folder, "a/0.png", &png(1));
    file(&folder, "a/readme.txt", b"hello");
    let message = refusal(&folder.path().join("a"));
    assert!(message.contains("readme.txt: no image that can be read"), "{message}");
    file(&folder, "b/0.png", &png(1));
    file(&folder, "b/1.png", &png(1)[..40]);
    let message = refusal(&folder.path().join("b"));
    assert!(message.contains("1.png: no image that can be read"), "{message}");
    let mut other = std::io::Cursor::new(Vec::new());
    RgbImage::new(4, 4).write_to(&mut other, ImageFormat::Png).expect("in memory");
    file(&folder, "c/0.png", &png(1));
    file(&folder, "c/1.png", other.get_ref());
    let message = refusal(&folder.path().join("c"));
    assert!(message.contains("1.png: is 4×4, the first image is 3×2"), "{message}");
    fs::create_dir(folder.path().join("d")).expect("a folder");
    assert!(refusal(&folder.path().join("d")).contains("holds no images"));
}

#[test]
fn gray_files_among_coloured_ones_are_colour() {
    let folder = tempdir().expect("a folder");
    let mut colour = std::io::Cursor::new(Vec::new());
    let image = RgbImage::from_pixel(3, 2, [1, 2, 3].into());
    image.write_to(&mut colour, ImageFormat::Png).expect("in memory");
    file(&folder, "set/0.png", colour.get_ref());
    file(&folder, "set/1.png", &png(9));
    let images = Images::open(&folder.path().join("set")).expect("images");
    assert_eq!((images.channels, images.labels.clone()), (3, None));
    assert_eq!(images.image(1)[..6], [9, 9, 9, 10, 10, 10]);
}

#[test]
fn arrays_are_read_as_guided_diffusion_writes_them() {
    let folder = tempdir().expect("a folder");
    let path = folder.path().join("samples.npz");
    let pixels = Array { shape: vec![2, 1, 2, 3], values: Values::U8((0..12).collect()) };
    let labels = Array { shape: vec![2], values: Values::I64(vec![3, 1]) };
    npz::write(&path, &[("arr_0", pixels.clone()), ("arr_1", labels)]).expect("written");
    let images = Images::open(&path).expect("images");
    assert_eq!((images.channels, images.height, images.width), (3, 1, 2));
    assert_eq!(images.labels, Some(vec![3, 1]));
    let floats = Array { shape: vec![1, 1, 1], values: Values::F32(vec![0.5]) };
    npz::write(&path, &[("arr_0", floats)]).expect("written");
    assert!(refusal(&path).contains("`arr_0` is not uint8"));
    npz::write(&path, &[("images", pixels)]).expect("written");
    assert!(refusal(&path).contains("has no array `arr_0`, only: images"));
}

#[test]
fn small_images_are_centred_on_background() {
    let images = Images {
        channels: 1,
        height: 2,
        width: 1,
        pixels: vec![1, 2, 3, 4],
        labels: None,
        ..Images::default()
    };
    let fitted = images.clone().fit("--data", 1, 4, 4).expect("fits");
    assert_eq!(fitted.image(1), [0, 0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0]);
    let batch = fitted.batch(&[1], &Device::Cpu).expect("a batch");
    assert_eq!(batch.dims(), [1, 1, 4, 4]);
    let values: Vec<f32> = batch.flatten_all().and_then(|x| x.to_vec1()).expect("values");
    assert_eq!((values[0], values[5]), (-1.0, 3.0 / 127.5 - 1.0));
    let larger = images.clone().fit("--data", 1, 1, 4).expect_err("too large");
    assert!(larger.to_string().contains("`--data` is a set of 1×2 gray images"), "{larger}");
    assert!(images.fit("--data", 3, 4, 4).is_err());
}

fn archive(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, kind, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        match kind {
            tar::EntryType::Link | tar::EntryType::Symlink => {
                tar.append_link(&mut header, name, "a/0.png").expect("an entry");
            }
            _ => tar.append_data(&mut header, name, *bytes).expect("an entry"),
        }
    }
    tar.into_inner().expect("an archive")
}

#[test]
fn classes_that_are_numbers_are_in_their_order() {
    let folder = tempdir().expect("a folder");
    for class in ["10", "2", "0", "1"] {
        file(&folder, &format!("set/{class}/0.png"), &png(class.parse().expect("a number")));
    }
    let images = Images::open(&folder.path().join("set")).expect("images");
    assert_eq!(images.class_names, ["0", "1", "2", "10"]);
    // In the order of the files' names.
    assert_eq!(images.labels, Some(vec![0, 1, 3, 2]));
    file(&folder, "set/x/0.png", &png(0));
    let images = Images::open(&folder.path().join("set")).expect("images");
    assert_eq!(images.class_names, ["0", "1", "10", "2", "x"]);
}

#[test]
fn an_empty_class_folder_is_refused() {
    use tar::EntryType::{Directory, Regular};
    let folder = tempdir().expect("a folder");
    file(&folder, "set/a/0.png", &png(1));
    file(&folder, "set/c/0.png", &png(2));
    // What is left there is no image.
    file(&folder, "set/b/.DS_Store", b"x");
    let message = refusal(&folder.path().join("set"));
    assert!(message.contains("b: is a class folder without images"), "{message}");
    let image = png(1);
    let tar = archive(&[
        ("set/", Directory, b""),
        ("set/a/", Directory, b""),
        ("set/a/0.png", Regular, &image),
        ("set/b/", Directory, b""),
    ]);
    let message = refusal(&file(&folder, "set.tar", &tar));
    assert!(message.contains("set.tar/set/b: is a class folder without images"), "{message}");
}

#[test]
fn litter_is_skipped_and_counted() {
    use tar::EntryType::{Directory, Regular};
    let folder = tempdir().expect("a folder");
    let image = png(1);
    for name in ["a/0.png", "b/0.png"] {
        file(&folder, &format!("set/{name}"), &image);
    }
    for name in
        [".DS_Store", "a/Thumbs.db", "b/desktop.ini", "a/._0.png", ".ipynb_checkpoints/0.png"]
    {
        file(&folder, &format!("set/{name}"), b"litter");
    }
    let images = Images::open(&folder.path().join("set")).expect("images");
    assert_eq!((images.len(), images.skipped), (2, 5));
    assert_eq!(images.class_names, ["a", "b"]);
    let tar = archive(&[
        ("./a/", Directory, b""),
        ("./a/0.png", Regular, &image),
        ("./a/._0.png", Regular, b"litter"),
        ("__MACOSX/a/._0.png", Regular, b"litter"),
        ("./b/0.png", Regular, &image),
    ]);
    let archived = Images::open(&file(&folder, "set.tar", &tar)).expect("images");
    assert_eq!((archived.len(), archived.skipped), (2, 2));
    assert_eq!(archived.class_names, images.class_names);
    assert_eq!(archived.sha256(), images.sha256(), "what is skipped is no part of the set");
}

#[test]
fn what_is_no_image_is_named_for_what_it_is() {
    use tar::EntryType::{Fifo, Link, Regular, Symlink};
    let folder = tempdir().expect("a folder");
    let image = png(1);
    file(&folder, "nested/n01/images/0.png", &image);
    let message = refusal(&folder.path().join("nested"));
    assert!(message.contains("n01/images: is a folder inside the class folder"), "{message}");
    let first = ("a/0.png", Regular, &image[..]);
    let nested = archive(&[("a/i/0.png", Regular, &image), ("b/i/0.png", Regular, &image)]);
    for (name, tar, words) in [
        ("link.tar", archive(&[first, ("a/1.png", Link, b"")]), "a/1.png: is a hard link"),
        (
            "symlink.tar",
            archive(&[first, ("a/1.png", Symlink, b"")]),
            "a/1.png: is a symbolic link",
        ),
        ("fifo.tar", archive(&[first, ("a/1.png", Fifo, b"")]), "is neither a file nor a folder"),
        (
            "captions.tar",
            archive(&[first, ("metadata.jsonl", Regular, b"{}")]),
            "metadata.jsonl: captions are read from folders",
        ),
        ("nested.tar", nested, "b/i/0.png: its folder is not beside the first class's, a/i"),
        ("set.tar.bz2", b"BZh91AY&SY\xff\0\x01".to_vec(), "compressed with bzip2"),
        ("set.tar.xz", b"\xfd7zXZ\0\0\x04".to_vec(), "compressed with xz"),
        ("set.png", image.clone(), "a single picture"),
        ("set.npy", b"\x93NUMPY\x01\0".to_vec(), "a single NumPy array"),
    ] {
        let message = refusal(&file(&folder, name, &tar));
        assert!(message.contains(words), "{message}");
        assert!(message.chars().all(|c| !c.is_control()), "{message:?}");
    }
    // Damage that the checksum of the first header does not show.
    let mut broken = archive(&[first, ("a/1.png", Regular, &image)]);
    broken[1024..1536].fill(0xff);
    let message = refusal(&file(&folder, "broken.tar", &broken));
    assert!(message.contains("not a whole tar archive"), "{message}");
    assert!(message.chars().all(|c| !c.is_control()), "{message:?}");
}

#[test]
fn kinds_are_told_by_content() {
    let folder = tempdir().expect("a folder");
    let image = png(1);
    let tar = archive(&[("a/0.png", tar::EntryType::Regular, &image)]);
    let idx = idx(3, &[1, 2, 3], &[0; 6]);
    for (name, bytes) in [
        ("tar.NPZ", tar.clone()),
        ("pictures", gzip(&tar)),
        ("x.tar", idx.clone()),
        ("y.TAR.GZ", gzip(&idx)),
    ] {
        let images = Images::open(&file(&folder, name, &bytes)).expect("images");
        assert_eq!(images.len(), 1, "{name}");
    }
    let path = folder.path().join("SAMPLES");
    let pixels = Array { shape: vec![2, 1, 2, 3], values: Values::U8((0..12).collect()) };
    npz::write(&path, &[("arr_0", pixels)]).expect("written");
    assert_eq!(Images::open(&path).expect("images").len(), 2);
}

#[cfg(unix)]
#[test]
fn pipes_and_devices_are_refused() {
    let folder = tempdir().expect("a folder");
    assert!(refusal(Path::new("/dev/zero")).contains("/dev/zero: is a device"));
    file(&folder, "set/0.png", &png(1));
    std::os::unix::fs::symlink("/dev/zero", folder.path().join("set/1.png")).expect("a link");
    assert!(refusal(&folder.path().join("set")).contains("1.png: is a device"));
}

#[test]
fn captions_and_classes_stand_in_metadata() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.png", "b.png"] {
        file(&folder, name, &png(name.len() as u8));
    }
    let told = |lines: &str| {
        file(&folder, "metadata.jsonl", lines.as_bytes());
        folder.path()
    };
    let a = r#"{"file_name": "a.png", "text": "dog", "label": "noto", "more": 1}"#;
    let b = r#"{"file_name": "b.png", "text": "cat", "label": "flat"}"#;
    let images = Images::open(told(&format!("{b}\n{a}\n\n"))).unwrap();
    assert_eq!(images.captions, Some(vec!["dog".to_owned(), "cat".to_owned()]));
    assert_eq!(
        (images.labels, images.class_names.join(" ")),
        (Some(vec![1, 0]), "flat noto".into())
    );
    let numbers =
        "{\"file_name\": \"a.png\", \"label\": 7}\n{\"file_name\": \"b.png\", \"label\": 2}";
    let images = Images::open(told(numbers)).unwrap();
    assert_eq!((images.captions, images.labels), (None, Some(vec![7, 2])));
    for (lines, words) in [
        (a.to_owned(), "b.png: metadata.jsonl does not tell of it"),
        (format!("{a}\n{b}\n{a}"), "line 3: line 1 tells of the same file"),
        (
            format!("{a}\n{b}\n{{\"file_name\": \"c.png\"}}"),
            "line 3: c.png is no image in this folder",
        ),
        (format!("{a}\n{{\"file_name\": \"b.png\", \"label\": \"x\"}}"), "line 2: has no `text`"),
        (
            format!("{a}\n{{\"file_name\": \"b.png\", \"text\": \"x\", \"label\": 3}}"),
            "some labels are numbers",
        ),
        (format!("{a}\n{{\"text\": \"x\"}}"), "line 2: missing field `file_name`"),
        (format!("{a}\n[]"), "line 2: "),
    ] {
        let refused = refusal(told(&lines));
        assert!(refused.contains(words), "{lines}: {refused}");
    }
}

//! Folders and tar archives of PNG, JPEG and WebP files, directly or in one folder per class.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use image::DynamicImage;
use understudy_models::{Error, Result};

use super::{Images, malformed};

/// Reads a folder; images are in the order of their names, classes in that of theirs.
pub(super) fn folder(path: &Path) -> Result<Images> {
    let mut collected = Collected::default();
    for entry in sorted(path)? {
        if entry.is_dir() {
            let class = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
            for file in sorted(&entry)? {
                collected.push(&file, Some(&class), &read(&file)?)?;
            }
        } else {
            collected.push(&entry, None, &read(&entry)?)?;
        }
    }
    collected.finish(path)
}

/// Reads a tar archive, gzipped or compressed with zstd or neither; images are in the order of the
/// archive. Names in errors are `archive/entry`.
pub(super) fn archive(path: &Path) -> Result<Images> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = BufReader::new(File::open(path).map_err(io)?);
    let name = path.to_string_lossy().to_lowercase();
    let unpacked: Box<dyn Read> = if name.ends_with("gz") {
        Box::new(MultiGzDecoder::new(file))
    } else if name.ends_with(".zst") {
        let decoder = ruzstd::decoding::StreamingDecoder::new(file);
        Box::new(decoder.map_err(|error| malformed(path, format!("not zstd ({error})")))?)
    } else {
        Box::new(file)
    };
    let broken = |error| malformed(path, format!("not a whole tar archive ({error})"));
    let mut collected = Collected::default();
    for entry in tar::Archive::new(unpacked).entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        if entry.header().entry_type().is_dir() {
            continue;
        }
        let inside = entry.path().map_err(broken)?.into_owned();
        let folders: Vec<_> = inside.parent().into_iter().flat_map(Path::components).collect();
        let class = folders.last().map(|folder| folder.as_os_str().to_string_lossy().into_owned());
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(broken)?;
        collected.push(&path.join(inside), class.as_deref(), &bytes)?;
    }
    collected.finish(path)
}

/// Images as they come in.
#[derive(Default)]
struct Collected {
    /// Width and height of the first.
    size: Option<(u32, u32)>,
    /// Each picture, and its class's name.
    pictures: Vec<(Picture, Option<String>)>,
}

enum Picture {
    Gray(Vec<u8>),
    Rgb(Vec<u8>),
}

impl Collected {
    fn push(&mut self, name: &Path, class: Option<&str>, bytes: &[u8]) -> Result<()> {
        let decoded = image::load_from_memory(bytes).map_err(|error| {
            malformed(name, format!("no image that can be read ({error}); remove or replace it"))
        })?;
        let found = (decoded.width(), decoded.height());
        let size = *self.size.get_or_insert(found);
        if found != size {
            let problem = format!(
                "is {}×{}, the first image is {}×{}; all must be of one size",
                found.0, found.1, size.0, size.1
            );
            return Err(malformed(name, problem));
        }
        if let Some((_, first)) = self.pictures.first()
            && first.is_some() != class.is_some()
        {
            let problem =
                "some images stand in class folders and some do not; use one or the other";
            return Err(malformed(name, problem));
        }
        let picture = Picture::of(decoded).ok_or_else(|| {
            malformed(name, "is not 8-bit gray or RGB, or is transparent; convert it first")
        })?;
        self.pictures.push((picture, class.map(str::to_owned)));
        Ok(())
    }

    fn finish(self, path: &Path) -> Result<Images> {
        let Some((width, height)) = self.size else {
            return Err(malformed(path, "holds no images"));
        };
        // A gray file among coloured ones is a colour image that happens to be gray.
        let gray = self.pictures.iter().all(|(picture, _)| matches!(picture, Picture::Gray(_)));
        let names = self.pictures.iter().filter_map(|(_, class)| class.clone());
        let class_names: Vec<String> = names.collect::<BTreeSet<_>>().into_iter().collect();
        let number = |class: &Option<String>| {
            let class = class.as_ref()?;
            class_names.binary_search(class).ok().map(|number| number as u32)
        };
        let labels = self.pictures.iter().map(|(_, class)| number(class)).collect();
        let mut pixels = Vec::new();
        for (picture, _) in self.pictures {
            match picture {
                Picture::Gray(bytes) if gray => pixels.extend(bytes),
                Picture::Gray(bytes) => pixels.extend(bytes.iter().flat_map(|&byte| [byte; 3])),
                Picture::Rgb(bytes) => pixels.extend(bytes),
            }
        }
        Ok(Images {
            channels: if gray { 1 } else { 3 },
            height: height as usize,
            width: width as usize,
            pixels,
            labels,
            class_names,
        })
    }
}

impl Picture {
    /// Nothing where pixels would be lost: more than 8 bits, or transparency that is used.
    fn of(decoded: DynamicImage) -> Option<Self> {
        match decoded {
            DynamicImage::ImageLuma8(image) => Some(Self::Gray(image.into_raw())),
            DynamicImage::ImageRgb8(image) => Some(Self::Rgb(image.into_raw())),
            DynamicImage::ImageLumaA8(image) => opaque::<2>(&image).map(Self::Gray),
            DynamicImage::ImageRgba8(image) => opaque::<4>(&image).map(Self::Rgb),
            _ => None,
        }
    }
}

/// The bytes without alpha, where that is 255 throughout.
fn opaque<const N: usize>(bytes: &[u8]) -> Option<Vec<u8>> {
    let pixels = bytes.as_chunks::<N>().0;
    let opaque = pixels.iter().all(|pixel| pixel[N - 1] == u8::MAX);
    opaque.then(|| pixels.iter().flat_map(|pixel| pixel[..N - 1].to_vec()).collect())
}

fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io { path: folder.to_owned(), source };
    let entries = fs::read_dir(folder).map_err(io)?;
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>().map_err(io)?;
    paths.sort();
    Ok(paths)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).map_err(|source| Error::Io { path: file.to_owned(), source })
}

//! Images that begin with another: forms, and what is refused in them.

use std::io::Cursor;

use axum::{body::Body, http::Request};
use base64::{Engine, prelude::BASE64_STANDARD};
use image::{ImageFormat, RgbImage};
use serde_json::Value;

use crate::server::{CLASSES, PLAIN, Reply, Server, TEXT};

pub(crate) const BOUNDARY: &str = "a-line-between-fields";

/// A form of fields, and of files with their names.
pub(crate) fn form(fields: &[(&str, &str)], files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, value) in fields {
        let part = format!(
            "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n"
        );
        body.extend_from_slice(part.as_bytes());
    }
    for (name, bytes) in files {
        let head = format!(
            "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"a\"\r\nContent-Type: image/png\r\n\r\n"
        );
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(bytes);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    body
}

async fn posted(server: &Server, body: Vec<u8>) -> Reply {
    let kind = format!("multipart/form-data; boundary={BOUNDARY}");
    let request = Request::post("/v1/images/edits").header("content-type", kind);
    server.send(request.body(Body::from(body)).unwrap()).await
}

async fn edited(server: &Server, fields: &[(&str, &str)], picture: &[u8]) -> Reply {
    posted(server, form(fields, &[("image", picture)])).await
}

/// A picture whose pixels follow from `seed`, as a PNG.
pub(crate) fn picture(width: u32, height: u32, seed: u32) -> Vec<u8> {
    let of = |x: u32, y: u32| [x * 9 + seed, y * 7 + seed, x * y + seed].map(|it| it as u8);
    let image = RgbImage::from_fn(width, height, |x, y| image::Rgb(of(x, y)));
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// A PNG that is transparent where `drawn` says so.
fn stencil(width: u32, height: u32, drawn: impl Fn(u32, u32) -> bool) -> Vec<u8> {
    let of = |x, y| image::Rgba([9, 9, 9, if drawn(x, y) { 0 } else { 255 }]);
    let image = image::RgbaImage::from_fn(width, height, of);
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn pixels(reply: &Reply) -> (Vec<u8>, (u32, u32)) {
    assert_eq!(reply.status, 200, "{}", reply.text());
    let entry: Value = reply.json()["data"][0]["b64_json"].clone();
    let bytes = BASE64_STANDARD.decode(entry.as_str().unwrap()).unwrap();
    let image = image::load_from_memory(&bytes).unwrap();
    let size = (image.width(), image.height());
    (image.into_rgb8().into_raw(), size)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_seed_and_strength_say_what_is_drawn() {
    let server = Server::with_text().await;
    let fields = |strength: &'static str, seed: &'static str| {
        [
            ("model", TEXT),
            ("prompt", "red apple"),
            ("strength", strength),
            ("seed", seed),
            ("num_inference_steps", "6"),
        ]
    };
    let own = picture(16, 16, 3);
    let usual = pixels(&edited(&server, &fields("0.5", "4"), &own).await);
    assert_eq!(usual.1, (16, 16));
    let other = picture(16, 16, 90);
    let [same, seeded, stronger] =
        [("0.5", "4"), ("0.5", "5"), ("0.9", "4")].map(|it| fields(it.0, it.1));
    let (again, seed, strength, begun) = tokio::join!(
        edited(&server, &same, &own),
        edited(&server, &seeded, &own),
        edited(&server, &stronger, &own),
        edited(&server, &same, &other),
    );
    assert_eq!(pixels(&again), usual, "alone or among others");
    for changed in [seed, strength, begun] {
        assert_ne!(pixels(&changed), usual);
    }
    // Its own size, as far as the model makes it, or the one that is asked for.
    assert_eq!(
        pixels(&edited(&server, &fields("0.5", "4"), &picture(27, 17, 3)).await).1,
        (24, 16)
    );
    let mut sized = fields("0.5", "4").to_vec();
    sized.push(("size", "32x16"));
    assert_eq!(pixels(&edited(&server, &sized, &own).await).1, (32, 16));
}

#[tokio::test(flavor = "multi_thread")]
async fn models_on_pixels_begin_with_the_pixels() {
    let server = Server::start().await;
    let little =
        [("model", PLAIN), ("strength", "0.01"), ("num_inference_steps", "100"), ("seed", "1")];
    let made = server.get(&format!("/v1/models/{PLAIN}")).await.json()["size"].clone();
    let side: u32 = made.as_str().unwrap().split('x').next().unwrap().parse().unwrap();
    let bytes = picture(side, side, 40);
    let drawn = pixels(&edited(&server, &little, &bytes).await).0;
    let own = image::load_from_memory(&bytes).unwrap().into_rgb8().into_raw();
    let far = drawn.iter().zip(&own).map(|(a, b)| u32::from(a.abs_diff(*b))).sum::<u32>();
    assert!(far < 12 * own.len() as u32, "a hundredth of the way leaves the picture: {far}");
    // Gray, of a class, and scaled.
    let fields = [("model", CLASSES), ("prompt", "Bag"), ("strength", "1"), ("n", "2")];
    let reply = edited(&server, &fields, &picture(31, 7, 2)).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["data"].as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_mask_leaves_stays() {
    let server = Server::start().await;
    let made = server.get(&format!("/v1/models/{PLAIN}")).await.json()["size"].clone();
    let side: u32 = made.as_str().unwrap().split('x').next().unwrap().parse().unwrap();
    let bytes = picture(side, side, 40);
    let left = |x: u32| x < side / 2;
    let half = stencil(side, side, |x, _| left(x));
    for scheduler in ["ddim", "dpm++", "heun", "ddpm"] {
        let fields = [
            ("model", PLAIN),
            ("strength", "0.9"),
            ("num_inference_steps", "10"),
            ("scheduler", scheduler),
        ];
        let reply = posted(&server, form(&fields, &[("image", &bytes), ("mask", &half)])).await;
        let drawn = pixels(&reply).0;
        let own = image::load_from_memory(&bytes).unwrap().into_rgb8().into_raw();
        let differ = |of_left: bool| {
            let pixels = drawn.chunks(3).zip(own.chunks(3)).enumerate();
            let of = pixels.filter(|(place, _)| left(*place as u32 % side) == of_left);
            of.filter(|(_, (a, b))| a != b).count()
        };
        assert_eq!(differ(false), 0, "{scheduler}: what stays is the same to the bit");
        assert!(differ(true) > 0, "{scheduler}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_image_or_no_form_is_refused() {
    let server = Server::with_text().await;
    let own = picture(16, 16, 1);
    let mut bomb = own.clone();
    // Width and height of the header, and its checksum.
    bomb[16..24].copy_from_slice(&[0, 0, 0x9c, 0x40, 0, 0, 0x9c, 0x40]);
    let checksum = crc(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&checksum.to_be_bytes());
    let cut = &own[..own.len() / 2];
    let large = picture(64, 64, 1);
    let small = stencil(8, 8, |_, _| true);
    type Case<'a> = (&'a [(&'a str, &'a str)], &'a [(&'a str, &'a [u8])], &'a str, &'a [&'a str]);
    let model = ("model", TEXT);
    let cases: [Case; 16] = [
        (&[model], &[], "image", &["missing"]),
        (&[model], &[("image", b"GIF89a")], "image", &["PNG, JPEG or WebP"]),
        (&[model], &[("image", b"")], "image", &["PNG, JPEG or WebP"]),
        (&[model], &[("image", cut)], "image", &["cannot be read"]),
        (&[model], &[("image", &bomb)], "image", &["image"]),
        (&[model], &[("image", &own), ("image", &own)], "image", &["more than once"]),
        (&[model], &[("image", &own), ("mask", &own)], "mask", &["alpha"]),
        (&[model], &[("image", &own), ("mask", &small)], "mask", &["8x8", "16x16"]),
        (&[model], &[("image", &large)], "image", &["64x64", "--max-pixels"]),
        (&[model, ("strength", "2")], &[("image", &own)], "strength", &["2", "to 1"]),
        (&[model, ("strength", "0")], &[("image", &own)], "strength", &["above 0"]),
        (&[model, ("strength", "NaN")], &[("image", &own)], "strength", &["NaN", "number"]),
        (
            &[model, ("strength", "0.1"), ("num_inference_steps", "3")],
            &[("image", &own)],
            "strength",
            &["3 steps"],
        ),
        (&[model, ("n", "x")], &[("image", &own)], "n", &["whole number"]),
        (&[model, ("nn", "1")], &[("image", &own)], "nn", &["not a field", "strength"]),
        (&[model, ("n", "1"), ("n", "1")], &[("image", &own)], "n", &["more than once"]),
    ];
    for (fields, files, param, parts) in cases {
        let reply = posted(&server, form(fields, files)).await;
        assert_eq!(reply.status, 400, "{fields:?}: {}", reply.text());
        let error = reply.json()["error"].clone();
        assert_eq!(error["param"], param, "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    let reply = server.post("/v1/images/edits", r#"{"prompt": "x"}"#).await;
    assert_eq!(reply.status, 415, "{}", reply.text());
    let request = Request::post("/v1/images/edits").header("content-type", "multipart/form-data");
    let reply = server.send(request.body(Body::from("x")).unwrap()).await;
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(reply.text().contains("boundary"), "{}", reply.text());
    let reply = posted(&server, b"no form at all".to_vec()).await;
    assert_eq!(reply.status, 400, "{}", reply.text());
    let reply = posted(&server, form(&[model], &[("image", &vec![0; 70_000])])).await;
    assert_eq!(reply.status, 413, "{}", reply.text());
    // Nothing of it has harmed anyone.
    pixels(&edited(&server, &[model, ("prompt", "x"), ("num_inference_steps", "3")], &own).await);
}

/// PNG's checksum.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 }
        })
    })
}

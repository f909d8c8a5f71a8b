//! The page at `/` is whole.

use crate::server::Server;

/// Everything that the page's text names below `/web/`.
fn parts(text: &str) -> Vec<&str> {
    text.split('"').filter(|word| word.starts_with("/web/")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_page_names_is_served_and_small() {
    let server = Server::start().await;
    let page = server.get("/").await;
    assert_eq!(page.header("content-type"), "text/html; charset=utf-8");
    assert!(page.header("content-security-policy").starts_with("default-src 'self'"));
    let parts = parts(&page.text()).into_iter().map(str::to_owned).collect::<Vec<_>>();
    assert!(parts.len() > 1, "{parts:?}");
    let mut bytes = page.text().len();
    for path in parts {
        let part = server.get(&path).await;
        assert_eq!(part.status, 200, "{path}");
        let media_type = if path.ends_with(".css") { "text/css" } else { "text/javascript" };
        assert!(part.header("content-type").starts_with(media_type), "{path}");
        bytes += part.text().len();
    }
    assert!(bytes < 100_000, "{bytes} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn modules_import_only_what_the_page_names() {
    let server = Server::start().await;
    let page = server.get("/").await.text();
    for path in parts(&page).into_iter().filter(|path| path.ends_with(".js")) {
        let module = server.get(path).await.text();
        for imported in module.lines().filter_map(|line| line.split_once(" from \"./")) {
            let name = imported.1.trim_end_matches("\";");
            assert!(page.contains(&format!("\"/web/{name}\"")), "{path} imports {name}");
        }
    }
}
